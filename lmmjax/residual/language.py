"""The residual language: text such as ``"ar1(day | id) * varident(diet)"`` to a specification.

R_i = σ² S_i C_i S_i: factors joined by ``*``, at most one correlation C, any number of variance
functions S. Left of the bar stands the position within the subject (``1`` is the order of rows),
right of it the subject. The expressions are those of formulas (`lmmjax.expr`), so errors point at
the place in the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lmmjax.expr import Call, Name, Node, Number, deparse, fail, parse_expr

__all__ = ["Correlation", "ResidualSpec", "Variance", "parse_residual"]

#: name -> (family, whether the variances differ by position)
CORRELATIONS: dict[str, tuple[str, bool]] = {
    "cs": ("cs", False),
    "csh": ("cs", True),
    "ar1": ("ar1", False),
    "ar1h": ("ar1", True),
    "car1": ("car1", False),
    "arma": ("arma", False),
    "toep": ("toep", False),
    "toeph": ("toep", True),
    "ad": ("ad", False),
    "adh": ("ad", True),
    "symm": ("un", False),
    "un": ("un", True),
    "spexp": ("spexp", False),
    "spgau": ("spgau", False),
    "sppow": ("sppow", False),
}
SPATIAL = ("spexp", "spgau", "sppow")
VARIANCES = ("varident", "varpower", "varexp", "varfixed")

#: SAS's TYPE= names that are no names of a call; each is replaced by text of the same length
_SAS = {
    r"ar\s*\(\s*1\s*\)": "ar1",
    r"arh\s*\(\s*1\s*\)": "ar1h",
    r"arma\s*\(\s*1\s*,\s*1\s*\)": "arma",
    r"ante\s*\(\s*1\s*\)": "adh",
    r"sp\s*\(\s*exp\s*\)": "spexp",
    r"sp\s*\(\s*gau\s*\)": "spgau",
    r"sp\s*\(\s*pow\s*\)": "sppow",
}
_OPTIONS = {"arma": ("p", "q"), "spexp": ("nugget",), "spgau": ("nugget",), "sppow": ("nugget",)}


@dataclass(frozen=True)
class Correlation:
    """A correlation structure as written.

    Attributes
    ----------
    name, family : str
        As in the text (lower case), and what it is without its variances.
    heterogeneous : bool
        One variance per position.
    positions : tuple of Node
        Position or coordinates; empty for the order of rows.
    subject : tuple of Node
        Variables that together name the subject; empty where all rows are one subject.
    p, q : int
        Orders of ``arma``.
    nugget : bool
    """

    name: str
    family: str
    heterogeneous: bool
    positions: tuple[Node, ...]
    subject: tuple[Node, ...]
    p: int = 1
    q: int = 1
    nugget: bool = False

    @property
    def subject_name(self) -> str:
        return ":".join(deparse(node) for node in self.subject)


@dataclass(frozen=True)
class Variance:
    """A variance function as written: ``kind`` is ident, power, exp or fixed."""

    kind: str
    node: Node


@dataclass(frozen=True)
class ResidualSpec:
    """A parsed residual structure."""

    text: str
    correlation: Correlation | None
    variances: tuple[Variance, ...]

    @property
    def known(self) -> tuple[Variance, ...]:
        """The known variances, ``varfixed``."""
        return tuple(v for v in self.variances if v.kind == "fixed")

    @property
    def estimated(self) -> tuple[Variance, ...]:
        return tuple(v for v in self.variances if v.kind != "fixed")

    @property
    def structured(self) -> bool:
        """Whether anything is to be estimated beside σ."""
        return self.correlation is not None or bool(self.estimated)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Expressions whose values are needed (those of ``varfixed`` are read as weights)."""
        c = self.correlation
        first = () if c is None else (*c.positions, *c.subject)
        return (*first, *(v.node for v in self.estimated))

    def weights(self) -> str | None:
        """``varfixed(v)`` as an expression for precision weights, 1/v."""
        if not self.known:
            return None
        return "1/(" + " * ".join(f"({deparse(v.node)})" for v in self.known) + ")"


def parse_residual(text: Any) -> ResidualSpec:
    """Parse a residual structure.

    Parameters
    ----------
    text : str
        Factors joined by ``*``: ``cs csh ar1 ar1h car1 arma toep toeph ad adh symm un`` of
        ``(position | subject)``, ``spexp spgau sppow`` of ``(x, y | subject, nugget=False)``,
        ``varident(f) varpower(x) varexp(x) varfixed(v)``. SAS's names serve too: ``UN``, ``CS``,
        ``AR(1)``, ``ARH(1)``, ``TOEP``, ``ANTE(1)``, ``ARMA(1,1)``, ``SP(POW)``.

    Returns
    -------
    ResidualSpec

    Raises
    ------
    FormulaError
        With a line that points at the place.

    Examples
    --------
    >>> spec = parse_residual("AR(1)(day | id) * varident(diet)")
    >>> spec.correlation.name, spec.correlation.subject_name, spec.variances[0].kind
    ('ar1', 'id', 'ident')
    """
    if not isinstance(text, str):
        fail("", 0, f'found {type(text).__name__} as residual=; expected text: "ar1(day | id)".')
    if not text.strip():
        fail("", 0, f"found an empty residual=; expected a structure ({_offer()}), or None.")
    correlations, variances = [], []
    plain = _plain_names(text)
    for node in _factors(parse_expr(plain)):
        if not isinstance(node, Call):
            fail(plain, node.pos, f"found {deparse(node)}; expected a structure: {_offer()}.")
        name = node.fn.lower()
        if name in VARIANCES:
            variances.append(_variance(plain, node, name))
        elif name in CORRELATIONS:
            correlations.append((_correlation(plain, node, name), node.pos))
        else:
            fail(plain, node.pos, f"found the structure {node.fn}; expected one of {_offer()}.")
    if len(correlations) > 1:
        fail(
            plain,
            correlations[1][1],
            f"found a second correlation, {correlations[1][0].name}; expected at most one, beside "
            "any number of variance functions. Keep one of them.",
        )
    correlation = correlations[0][0] if correlations else None
    return ResidualSpec(text.strip(), correlation, tuple(variances))


def _offer() -> str:
    return f"{', '.join(CORRELATIONS)}; {', '.join(VARIANCES)}"


def _plain_names(text: str) -> str:
    """SAS's ``AR(1)(...)`` as ``ar1  (...)``: of the same length, so that places stay right."""
    for pattern, name in _SAS.items():
        text = re.sub(
            rf"\b{pattern}(?=\s*\()",
            lambda m, name=name: name.ljust(len(m.group())),  # type: ignore[misc]
            text,
            flags=re.IGNORECASE,
        )
    return text


def _factors(node: Node) -> list[Node]:
    if isinstance(node, Call) and node.fn == "*":
        return [*_factors(node.args[0]), *_factors(node.args[1])]
    if isinstance(node, Call) and node.fn == "(":
        return _factors(node.args[0])
    return [node]


def _variance(text: str, node: Call, name: str) -> Variance:
    if len(node.args) != 1 or any(node.keys):
        fail(text, node.pos, f"found {deparse(node)}; expected one expression: {name}(x).")
    if isinstance(node.args[0], Call) and node.args[0].fn == "|":
        fail(
            text,
            node.args[0].pos,
            f"found a bar in {name}, which knows no subject; expected {name}(x).",
        )
    return Variance(name.removeprefix("var"), node.args[0])


def _correlation(text: str, node: Call, name: str) -> Correlation:
    family, heterogeneous = CORRELATIONS[name]
    plain, options = _split_options(text, node, name)
    bars = [a for a in plain if isinstance(a, Call) and a.fn == "|"]
    if len(bars) > 1:
        fail(text, bars[1].pos, f"found two bars; expected one: {name}(position | subject).")
    if not bars and name not in SPATIAL:
        fail(
            text,
            node.pos,
            f"found no subject in {deparse(node)}; expected {name}(position | subject), with 1 as "
            "position for the order of rows.",
        )
    if bars and plain[-1] is not bars[0]:
        fail(text, bars[0].pos, f"found {deparse(plain[-1])} behind the subject; remove it.")
    subject = _subject(text, bars[0].args[1]) if bars else ()
    positions = (*plain[:-1], bars[0].args[0]) if bars else tuple(plain)
    positions = _positions(text, node, name, positions)
    return Correlation(name, family, heterogeneous, positions, subject, **options)


def _split_options(text: str, node: Call, name: str) -> tuple[list[Node], dict[str, Any]]:
    plain: list[Node] = []
    options: dict[str, Any] = {}
    keys = node.keys or (None,) * len(node.args)
    for key, arg in zip(keys, node.args, strict=True):
        if key is None:
            plain.append(arg)
        elif key in _OPTIONS.get(name, ()):
            options[key] = _flag(text, arg) if key == "nugget" else _order(text, arg, key)
        else:
            known = ", ".join(f"{k}=" for k in _OPTIONS.get(name, ())) or "none"
            fail(text, arg.pos, f"found the option {key}= of {name}; expected {known}.")
    if name == "arma" and options.get("p", 1) + options.get("q", 1) == 0:
        fail(text, node.pos, "found arma with p=0 and q=0; expected an order of at least 1.")
    return plain, options


def _flag(text: str, node: Node) -> bool:
    known = {"true": True, "false": False, "t": True, "f": False}
    if not isinstance(node, Name) or node.id.lower() not in known:
        fail(text, node.pos, f"found nugget={deparse(node)}; expected True or False.")
    return known[node.id.lower()]


def _order(text: str, node: Node, key: str) -> int:
    if not isinstance(node, Number) or node.value not in range(10):
        fail(text, node.pos, f"found {key}={deparse(node)}; expected a whole number from 0 to 9.")
    return int(node.value)


def _subject(text: str, node: Node) -> tuple[Node, ...]:
    """``a:b`` and ``a/b`` are the combinations of a and b."""
    if isinstance(node, Call) and node.fn in (":", "/"):
        return (*_subject(text, node.args[0]), *_subject(text, node.args[1]))
    if isinstance(node, Number):
        fail(text, node.pos, f"found the number {deparse(node)} as subject; expected a variable.")
    return (node,)


def _positions(text: str, node: Call, name: str, positions: tuple[Node, ...]) -> tuple[Node, ...]:
    if name in SPATIAL:
        for p in positions:
            if isinstance(p, Number):
                fail(text, p.pos, f"found a number as coordinate; {name} expects variables.")
        if not positions:
            fail(text, node.pos, f"found no coordinate; expected {name}(x, y | subject).")
        return positions
    if len(positions) != 1:
        fail(
            text,
            node.pos,
            f"found {len(positions)} positions in {name}; expected one: {name}(position | subject)."
            " Several coordinates are for spexp, spgau and sppow.",
        )
    (position,) = positions
    if not isinstance(position, Number):
        return positions
    if position.value != 1:
        fail(
            text, position.pos, f"found {deparse(position)} as position; expected 1 or a variable."
        )
    if name == "car1":
        fail(text, position.pos, "found 1 as position of car1; expected real times: car1(t | id).")
    return ()
