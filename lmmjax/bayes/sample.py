"""Making a posterior: settings checked, NUTS run, effects drawn exactly, names put back."""

from __future__ import annotations

import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax.bayes import draws as exact
from lmmjax.bayes import nuts
from lmmjax.bayes.numpyro_model import Spec, arrays, describe, prior_sites
from lmmjax.bayes.posterior import Posterior
from lmmjax.bayes.priors import Priors, resolve
from lmmjax.errors import ConvergenceWarning, DataError, LmmError
from lmmjax.model import Model
from lmmjax.pointwise import batch_size
from lmmjax.precision import in_float64

METHODS = ("nuts", "auto")

#: names that the data tree uses for its own dimensions
RESERVED = ("chain", "draw", "coef", "obs")


def sample_model(
    model: Model,
    *,
    method: str = "nuts",
    form: str = "marginal",
    draws: int = 1000,
    warmup: int = 1000,
    chains: int = 4,
    target_accept: float = 0.9,
    seed: int = 0,
    priors: Any = "default",
    progress: bool = False,
) -> Posterior:
    """Draw from the posterior by NUTS.

    Parameters
    ----------
    method : {"nuts", "auto"}
    form : {"marginal", "noncentered", "centered"}
        Marginal: random effects (and β under normal or flat priors) are integrated out and drawn
        exactly afterwards, so the sampler sees few parameters and no rows. The others sample the
        effects; all three define the same posterior.
    draws, warmup, chains : int
        Draws kept and warm-up iterations per chain; at least 4 draws.
    target_accept : float
        Mean acceptance probability that the step size aims at; raise it against divergences.
    seed : int
        The same seed gives the same draws.
    priors : {"default", "reml", "flat"}, dict or Priors
        See :func:`lmmjax.bayes.priors.resolve`; printed with the result.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Posterior

    Raises
    ------
    PriorError
        A prior is unknown, has the wrong support, or makes the posterior improper.

    Warns
    -----
    ConvergenceWarning
        R-hat > 1.01, fewer than 100 effective draws per chain, divergences, or E-BFMI < 0.3.

    Notes
    -----
    A step of the marginal form costs O(J S³ + (d + p)³), of the others O(n (p + S)); with a
    residual structure the cost of its cross-products or of whitening comes on top. The first
    call for a shape of model compiles; further calls for the same shape, families of priors and
    sizes do not.
    """
    if method not in METHODS:
        raise LmmError(
            f"method={method!r} is not available; expected 'nuts', or 'auto', which is the same."
        )
    settings = nuts.Settings(*_sizes(draws, warmup, chains), _probability(target_accept))
    _check_names(model)
    resolved = resolve(model.design, priors)
    spec = describe(model, form, resolved)
    began = time.perf_counter()
    values, stats, phi = _run(model, spec, settings, resolved, seed, progress)
    posterior = Posterior(
        model=model,
        form=form,
        priors=resolved,
        seed=seed,
        draws=settings.draws,
        warmup=settings.warmup,
        chains=settings.chains,
        target_accept=settings.target_accept,
        seconds=time.perf_counter() - began,
        values=values,
        stats=stats,
        phi=phi,
    )
    if posterior.problems:
        warnings.warn(_advice(posterior), ConvergenceWarning, stacklevel=3)
    return posterior


def _sizes(draws: int, warmup: int, chains: int) -> tuple[int, int, int]:
    for name, value, least in (("draws", draws, 4), ("warmup", warmup, 0), ("chains", chains, 1)):
        if not isinstance(value, int | np.integer) or value < least:
            raise LmmError(f"{name}={value!r} is not valid; expected an integer from {least} on.")
    return int(warmup), int(draws), int(chains)


def _probability(target_accept: float) -> float:
    if not 0 < target_accept < 1:
        raise LmmError(
            f"target_accept={target_accept!r} is not valid; expected a number between 0 and 1."
        )
    return float(target_accept)


def _check_names(model: Model) -> None:
    for group in model.groups:
        if group in (taken := (*RESERVED, *model.phi_names)):
            raise DataError(
                f"the grouping factor {group!r} has the name of a dimension or a variable of the "
                f"draws; expected any name but {', '.join(taken)}. Rename the column."
            )


@in_float64
def _run(
    model: Model, spec: Spec, settings: nuts.Settings, priors: Priors, seed: int, progress: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """Draws of all values by name, the sampler's statistics, free residual parameters; NumPy."""
    # NumPyro mixes number types, which a caller's strict promotion would refuse
    with jax.numpy_dtype_promotion("standard"):
        data = jax.tree.map(jnp.asarray, arrays(model, spec))
        sites, plain = prior_sites(model, spec, priors), spec.anonymous()
        trail = nuts.run(plain, settings, data, sites, seed, progress)
        stats = _stats(trail)
        if not np.all(np.isfinite(stats["lp"])):
            raise LmmError(
                "sampling met a log-density that is not finite; expected finite values at every "
                "draw. Check the data for columns of wildly different size and the priors for "
                f"supports that exclude the data:\n{priors.describe()}"
            )
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), trail.z)
        n = settings.chains * settings.draws
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), n)
        batch = batch_size(spec.layout.q * (spec.layout.p + spec.layout.d + 4))
        values = exact.complete(plain, data, sites, flat, keys, batch)
        out = {k: np.asarray(v, np.float64) for k, v in values.items()}
    out.setdefault("beta", np.empty((n, 0)))
    shaped = {k: v.reshape(settings.chains, settings.draws, *v.shape[1:]) for k, v in out.items()}
    phi = shaped.pop(exact.FREE, np.empty((settings.chains, settings.draws, 0)))
    return _named(spec, shaped), stats, phi


def _named(spec: Spec, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Group names in place of numbers; fixed effects first, residual parameters and σ last."""
    out = {"beta": values["beta"]}
    for kind in ("sd", "cor", "ranef"):
        for i, g in enumerate(spec.groups):
            if f"{kind}_{i}" in values:
                out[f"{kind}_{g.name}"] = values[f"{kind}_{i}"]
    names = [] if spec.residual is None else spec.residual.names
    return out | {name: values[name] for name in names} | {"sigma": values["sigma"]}


def _stats(trail: nuts.Trail) -> dict[str, np.ndarray]:
    steps = np.asarray(trail.n_steps)
    return {
        "lp": np.asarray(trail.lp),
        "energy": np.asarray(trail.energy),
        "acceptance_rate": np.asarray(trail.acceptance_rate),
        "step_size": np.asarray(trail.step_size),
        "n_steps": steps,
        "tree_depth": np.ceil(np.log2(steps + 1)).astype(np.int64),
        "diverging": np.asarray(trail.diverging),
    }


def _advice(posterior: Posterior) -> str:
    words = "; ".join(posterior.problems)
    todo = "use more draws and warm-up"
    if posterior.stats["diverging"].any():
        todo += f", or target_accept above {posterior.target_accept:g}"
    if posterior.form != "marginal":
        todo += ", or form='marginal'"
    return f"the draws are not to be trusted yet: {words}; {todo}."
