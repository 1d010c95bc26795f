"""Formula text to parts: response, fixed terms, offsets and random-effects terms.

Only text is handled here; no data are seen. The algebra of terms (``+ : * / ^ %in% -``) follows
Wilkinson and Rogers (1973) [1]_ in the form in which R's ``terms`` implements it, because the
order of columns and the choice between dummies and contrasts depend on its details. Random-effects
terms follow lme4: ``(x || g)`` becomes ``(1 | g) + (0 + x | g)``, ``(1 | a/b)`` becomes
``(1 | b:a) + (1 | a)``.

References
----------
.. [1] Wilkinson, G. N. and Rogers, C. E. (1973). Symbolic description of factorial models for
   analysis of variance. Applied Statistics 22, 392-399.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from lmmjax.expr import Call, Name, Node, Number, deparse, fail, parse_expr

__all__ = ["Bar", "ParsedFormula", "Terms", "expand", "parse"]

COVARIANCES = ("us", "diag", "hom", "cs", "homcs")
_RESIDUAL_ONLY = frozenset(
    "csh ar1 ar1h car1 arma toep toeph ad adh symm un spexp spgau sppow".split()
)
_ALGEBRA = frozenset(("+", "-", "*", "/", ":", "^", "%in%", "("))


@dataclass(frozen=True)
class Bar:
    """One random-effects term after expansion of ``||`` and ``a/b``.

    Attributes
    ----------
    expr : Node
        The left side, a formula without response (``1 + x``, ``0 + f``).
    group : str
        The grouping factor as lme4 names it: ``"Subject"``, ``"cask:batch"``.
    factors : tuple of Node
        The variables whose combinations are the levels, slowest first.
    cov : str
        One of ``us diag hom cs homcs``.
    """

    expr: Node
    group: str
    factors: tuple[Node, ...]
    cov: str
    pos: int = field(default=0, compare=False)

    @property
    def text(self) -> str:
        """The term as text, for messages."""
        inner = f"{deparse(self.expr)} | {self.group}"
        return f"({inner})" if self.cov == "us" else f"{self.cov}({inner})"


@dataclass(frozen=True)
class Terms:
    """The terms of a formula's right side, in R's order.

    Attributes
    ----------
    intercept : bool
    variables : tuple of str
        R's text of each variable, by first appearance in the formula.
    nodes : tuple of Node
        The expressions, in the order of `variables`.
    terms : tuple of tuple of int
        Each term as ascending positions in `variables`; by degree, then by appearance.
    """

    intercept: bool
    variables: tuple[str, ...]
    nodes: tuple[Node, ...]
    terms: tuple[tuple[int, ...], ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """R's term labels, without the intercept."""
        return tuple(":".join(self.variables[v] for v in term) for term in self.terms)


@dataclass(frozen=True)
class ParsedFormula:
    """The parts of a formula.

    Attributes
    ----------
    text : str
        The formula as given.
    response : str
        The left side as R prints it.
    fixed : str
        The right side without bars and offsets (``"1"`` if nothing else is left).
    offsets : tuple of str
        What stands in ``offset(...)``.
    bars : tuple of Bar
        The random-effects terms, expanded, in formula order.
    terms : Terms
        The fixed terms.
    response_node, offset_nodes
        The same parts as expressions.
    """

    text: str
    response: str
    fixed: str
    offsets: tuple[str, ...]
    bars: tuple[Bar, ...]
    terms: Terms
    response_node: Node
    offset_nodes: tuple[Node, ...]


def parse(text: str) -> ParsedFormula:
    """Split a formula into its parts.

    Parameters
    ----------
    text : str
        For example ``"Reaction ~ Days + (Days | Subject)"``.

    Returns
    -------
    ParsedFormula

    Raises
    ------
    FormulaError
        Malformed text; a caret line points at the place.

    Notes
    -----
    ``.`` (all other columns) is not supported. O(length of text), apart from powers.

    Examples
    --------
    >>> parts = parse("log(y) ~ x + offset(z) + (x || a/b)")
    >>> parts.response, parts.fixed, parts.offsets
    ('log(y)', 'x', ('z',))
    >>> [bar.text for bar in parts.bars]
    ['(1 | b:a)', '(1 | a)', '(0 + x | b:a)', '(0 + x | a)']
    """
    root = parse_expr(text)
    left, right = _sides(text, root)
    parts = _Parts(text)
    fixed = parts.collect(right) or Number(1.0)
    terms = expand(fixed, text)
    for name, node in zip(terms.variables, terms.nodes, strict=True):
        if name == deparse(left):
            fail(text, node.pos, f"found the response {name} on the right side too; remove it.")
    return ParsedFormula(
        text=text,
        response=deparse(left),
        fixed=deparse(fixed),
        offsets=tuple(map(deparse, parts.offsets)),
        bars=tuple(parts.bars),
        terms=terms,
        response_node=left,
        offset_nodes=tuple(parts.offsets),
    )


def _sides(text: str, root: Node) -> tuple[Node, Node]:
    if not (isinstance(root, Call) and root.fn == "~"):
        fail(text, 0, "found no '~'; write the response, '~' and the predictors: \"y ~ x\".")
    if len(root.args) == 1:
        fail(text, root.pos, "found no response on the left of '~'; write \"y ~ ...\".")
    for node in _walk(root):
        if node is not root and isinstance(node, Call) and node.fn == "~":
            fail(text, max(node.pos, root.pos), "found a second '~'; a formula has one.")
        if isinstance(node, Name) and node.id == ".":
            fail(text, node.pos, "found '.', which is not supported; name the columns.")
    for node in _walk(root.args[0]):
        if isinstance(node, Call) and node.fn in ("|", "||"):
            fail(text, node.pos, "found a bar in the response; random effects go right of '~'.")
    return root.args[0], root.args[1]


def _walk(node: Node) -> Iterator[Node]:
    yield node
    if isinstance(node, Call):
        for arg in node.args:
            yield from _walk(arg)


def _is_bar(node: Node) -> bool:
    return isinstance(node, Call) and node.fn in ("|", "||")


def _bars_in(node: Node) -> Iterator[Call]:
    """Yield bars reachable through formula operators; inside I(...) a bar is a logical or."""
    if not isinstance(node, Call):
        return
    if _is_bar(node):
        yield node
    if node.fn in _ALGEBRA or _is_bar(node) or _is_structure(node):
        for arg in node.args:
            yield from _bars_in(arg)


def _is_structure(node: Call) -> bool:
    return node.fn in COVARIANCES and any(map(_is_bar, node.args))


class _Parts:
    """Takes bars and offsets out of a sum; what is left is the fixed part."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.bars: list[Bar] = []
        self.offsets: list[Node] = []

    def collect(self, node: Node) -> Node | None:
        if not isinstance(node, Call):
            return node
        if node.fn in ("+", "-"):
            return self.sum(node)
        if node.fn == "(":
            return self.parenthesis(node)
        if _is_structure(node):
            self.structure(node)
            return None
        if node.fn == "offset":
            self.offset(node)
            return None
        self.refuse(node)
        return node

    def sum(self, node: Call) -> Node | None:
        if node.fn == "-":
            self.nothing_removed(node.args[-1])
        if len(node.args) == 1:
            return node if node.fn == "-" else self.collect(node.args[0])
        left = self.collect(node.args[0])
        right = node.args[1] if node.fn == "-" else self.collect(node.args[1])
        if left is not None and right is not None:
            return replace(node, args=(left, right))
        if right is not None and node.fn == "-":
            return replace(node, args=(right,), keys=(None,))
        return left if right is None else right

    def nothing_removed(self, node: Node) -> None:
        for bar in _bars_in(node):
            fail(self.text, bar.pos, "found '-' before a random-effects term; leave it out.")
        for inner in _walk(node):
            if isinstance(inner, Call) and inner.fn == "offset":
                fail(self.text, inner.pos, "found '-' before an offset; leave it out.")

    def parenthesis(self, node: Call) -> Node | None:
        inner = node.args[0]
        if _is_bar(inner):
            self.add(inner, "us")
            return None
        kept = self.collect(inner)
        return None if kept is None else replace(node, args=(kept,))

    def structure(self, node: Call) -> None:
        if len(node.args) != 1 or node.keys[0] is not None:
            fail(self.text, node.pos, f"found several arguments; write {node.fn}(1 + x | g).")
        bar = node.args[0]
        if isinstance(bar, Call) and bar.fn == "||":
            fail(self.text, bar.pos, f"found '||' inside {node.fn}(); write '|'.")
        self.add(bar, node.fn)

    def offset(self, node: Call) -> None:
        if len(node.args) != 1:
            fail(self.text, node.pos, "found an offset() without exactly one argument.")
        self.offsets.append(node.args[0])

    def refuse(self, node: Call) -> None:
        if node.fn in _RESIDUAL_ONLY and any(map(_is_bar, node.args)):
            fail(
                self.text,
                node.pos,
                f"found {node.fn}(... | ...), which is no covariance of random effects "
                f"({', '.join(COVARIANCES)}); residual structures go into residual=.",
            )
        if _is_bar(node):
            found = "found a bar outside parentheses; write the random-effects term as (x | g)."
            fail(self.text, node.pos, found)
        for bar in _bars_in(node):
            found = f"found a random-effects term inside {node.fn!r}; join it by '+'."
            fail(self.text, bar.pos, found)
        if node.fn in _ALGEBRA:
            for inner in _walk(node):
                if isinstance(inner, Call) and inner.fn == "offset":
                    fail(
                        self.text, inner.pos, f"found offset() inside {node.fn!r}; join it by '+'."
                    )

    def add(self, bar: Node, cov: str) -> None:
        assert isinstance(bar, Call)
        for side in bar.args:
            for nested in _bars_in(side):
                fail(self.text, nested.pos, "found a bar inside a bar; write one term per bar.")
        groups = _groups(bar.args[1], self.text)
        for expr in self.columns(bar):
            for label, factors in groups:
                self.bars.append(Bar(expr, label, factors, cov, bar.pos))

    def columns(self, bar: Call) -> list[Node]:
        """Split the left side of ``||`` term by term; a factor's levels stay together."""
        terms = expand(bar.args[0], self.text)
        if not terms.intercept and not terms.terms:
            fail(self.text, bar.pos, "found no random effect on the left of the bar; add a term.")
        if bar.fn == "|":
            return [bar.args[0]]
        alone: list[Node] = [Number(1.0)] if terms.intercept else []
        for term in terms.terms:
            node = terms.nodes[term[0]]
            for v in term[1:]:
                node = Call(":", (node, terms.nodes[v]), (None, None))
            alone.append(Call("+", (Number(0.0), node), (None, None)))
        return alone


def _groups(node: Node, text: str) -> list[tuple[str, tuple[Node, ...]]]:
    """Expand the right side of a bar: ``a/b`` gives ``b:a`` and ``a``."""
    if isinstance(node, Call) and node.fn == "(":
        return _groups(node.args[0], text)
    if isinstance(node, Call) and node.fn == "/":
        outer = _groups(node.args[0], text)
        nested = []
        label, factors = outer[0]
        for inner_label, inner in _groups(node.args[1], text):
            wrapped = f"({label})" if ":" in label else label
            nested.append((f"{inner_label}:{wrapped}", inner + factors))
        return nested + outer
    if isinstance(node, Call) and node.fn == ":":
        parts = [_one_group(arg, text) for arg in node.args]
        return [(":".join(label for label, _ in parts), sum((f for _, f in parts), ()))]
    if isinstance(node, Call) and node.fn in _ALGEBRA:
        found = f"found {node.fn!r} in a grouping factor; use ':' or '/', or one term per factor."
        fail(text, node.pos, found)
    if not isinstance(node, Name | Call):
        fail(text, node.pos, f"found {deparse(node)} as grouping factor; name a column.")
    return [(deparse(node), (node,))]


def _one_group(node: Node, text: str) -> tuple[str, tuple[Node, ...]]:
    groups = _groups(node, text)
    if len(groups) > 1:
        fail(text, node.pos, "found '/' inside ':' in a grouping factor; write the terms out.")
    label, factors = groups[0]
    return (f"({label})" if isinstance(node, Call) and node.fn == "(" else label), factors


def expand(node: Node, text: str = "") -> Terms:
    """Expand a right side into terms, in R's order.

    Parameters
    ----------
    node : Node
        A right side without bars and offsets.
    text : str
        The formula, for messages.

    Returns
    -------
    Terms
    """
    algebra = _Algebra(text or deparse(node))
    algebra.install(node)
    masks = algebra.terms(node, True)
    ordered = sorted(dict.fromkeys(masks), key=int.bit_count)  # stable within a degree
    nodes = tuple(algebra.variables.values())
    terms = tuple(tuple(v for v in range(len(nodes)) if mask >> v & 1) for mask in ordered)
    return Terms(algebra.intercept, tuple(algebra.variables), nodes, terms)


class _Algebra:
    """Terms as bit masks over the variables, as in R's ``terms.formula``."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.variables: dict[str, Node] = {}
        self.intercept = True

    def install(self, node: Node) -> None:
        """Number the variables by first appearance, those of removed terms included."""
        if isinstance(node, Call) and node.fn in _ALGEBRA:
            for arg in node.args[:1] if node.fn == "^" else node.args:
                self.install(arg)
        elif isinstance(node, Name | Call):
            self.variables.setdefault(deparse(node), node)

    def terms(self, node: Node, adding: bool) -> list[int]:
        if isinstance(node, Number):
            return self.constant(node, adding)
        if isinstance(node, Call) and node.fn in _ALGEBRA:
            return self.operator(node, adding)
        if isinstance(node, Name | Call):
            return [1 << list(self.variables).index(deparse(node))]
        fail(self.text, node.pos, f"found {deparse(node)} where a variable was expected.")

    def constant(self, node: Number, adding: bool) -> list[int]:
        if node.value not in (0.0, 1.0):
            found = f"found the number {deparse(node)} as a term; only 0 and 1 have a meaning"
            fail(self.text, node.pos, f"{found}. Arithmetic goes into I(...).")
        self.intercept = (node.value == 1.0) == adding
        return []

    def operator(self, node: Call, adding: bool) -> list[int]:
        if node.fn == "(" or (node.fn == "+" and len(node.args) == 1):
            return self.terms(node.args[0], adding)
        if node.fn == "-":
            return self.minus(node, adding)
        if node.fn == "^":
            return self.power(node, adding)
        left = self.terms(node.args[0], adding)
        right = self.terms(node.args[1], adding)
        crossed = [a | b for a in left for b in right]
        if node.fn == "+":
            return left + right
        if node.fn == ":":
            return crossed
        if node.fn == "*":
            return left + right + crossed
        if node.fn == "/":
            return left + [b | _union(left) for b in right]
        return [a | _union(right) for a in left]  # %in%

    def minus(self, node: Call, adding: bool) -> list[int]:
        kept = self.terms(node.args[0], adding) if len(node.args) == 2 else []
        removed = self.terms(node.args[-1], not adding)
        return [mask for mask in kept if mask not in removed]

    def power(self, node: Call, adding: bool) -> list[int]:
        exponent = node.args[1]
        if not (isinstance(exponent, Number) and exponent.value in range(1, 33)):
            found = f"found the power {deparse(exponent)}; expected a whole number of at least 1"
            fail(self.text, exponent.pos, f"{found}. A power of a variable is I(x^2).")
        base = self.terms(node.args[0], adding)
        result = base
        for _ in range(int(exponent.value) - 1):
            result = list(dict.fromkeys([a | b for a in result for b in base]))
        return result


def _union(masks: list[int]) -> int:
    union = 0
    for mask in masks:
        union |= mask
    return union
