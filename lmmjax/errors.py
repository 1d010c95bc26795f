"""Errors and warnings. Each message says what was found, what was expected and what to do."""


class LmmError(Exception):
    """Base class of every error that lmmjax raises on purpose."""


class FormulaError(LmmError, ValueError):
    """The formula text is malformed or asks for something that is not supported."""


class DataError(LmmError, ValueError):
    """The data do not fit the formula: unknown columns, wrong types, missing or infinite values."""


class DesignError(LmmError, ValueError):
    """The design built from formula and data cannot be fitted (no rows, too many effects ...)."""


class PriorError(LmmError, ValueError):
    """A prior is unknown, malformed, or leads to an improper posterior."""


class ComparisonError(LmmError, ValueError):
    """A comparison of fits is not valid."""


class PrecisionError(LmmError, RuntimeError):
    """A float64 function was called while JAX is in 32-bit mode."""


class ConvergenceWarning(UserWarning):
    """An optimiser or a sampler did not converge; the result says how."""


class SingularFitWarning(UserWarning):
    """A variance component or a correlation is on the boundary of its range."""


class EstimabilityWarning(UserWarning):
    """The data do not determine what was asked for: empty cells, aliased columns."""


class ResidualWarning(UserWarning):
    """Positions of a residual structure are doubtful, or its parameters are not identified."""


class DataWarning(UserWarning):
    """Some of the data could not be used as asked; the message says which."""
