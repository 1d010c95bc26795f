"""Small random designs, and the criterion by dense matrices: another route than the code's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from lmmjax import gram
from lmmjax.covariance import covariance


def factor_codes(rng: np.random.Generator, n: int, J: int) -> np.ndarray:
    """Codes of a factor with every level present."""
    codes = rng.integers(0, J, n)
    codes[rng.permutation(n)[:J]] = np.arange(J)
    return codes.astype(np.int32)


def design(terms: list[tuple[str, np.ndarray, int, str]], n: int, p: int, seed: int = 0) -> Any:
    """A Design-like object: ``terms`` are (group, codes, S, structure)."""
    rng = np.random.default_rng(seed)
    covariates = [rng.normal(size=n) * 10 + 2000 for _ in range(p - 1)]
    X = np.column_stack([np.ones(n), *covariates])[:, :p]
    made = []
    for group, codes, S, cov in terms:
        slopes = [rng.normal(size=n) + 5 for _ in range(S - 1)]
        made.append(
            SimpleNamespace(
                group=group,
                z=np.column_stack([np.ones(n), *slopes]),
                codes=codes,
                levels=np.arange(codes.max() + 1).astype(str),
                cov=cov,
                names=tuple(f"c{i}" for i in range(S)),
            )
        )
    y = rng.normal(size=n) * 3 + 100
    for t in made:
        y += rng.normal(size=len(t.levels))[t.codes] * 2
    return SimpleNamespace(
        X=X,
        y=y,
        offset=rng.normal(size=n),
        has_offset=True,
        has_weights=True,
        weights=rng.uniform(0.5, 2, n),
        terms=tuple(made),
        n=n,
        p=p,
    )


def layouts(n: int = 120) -> dict[str, list[tuple[str, np.ndarray, int, str]]]:
    """Terms of many shapes: none, one factor, several terms on it, nested, crossed, all of it."""
    rng = np.random.default_rng(7)
    a = factor_codes(rng, n, 15)
    parent = factor_codes(rng, 15, 4)
    b = parent[a]
    grandparent = factor_codes(rng, 4, 2)
    g = grandparent[b]
    c = factor_codes(rng, n, 6)
    return {
        "linear model": [],
        "intercept": [("a", a, 1, "us")],
        "slope": [("a", a, 2, "us")],
        "three columns": [("a", a, 3, "us")],
        "diagonal": [("a", a, 3, "diag")],
        "homogeneous": [("a", a, 2, "hom")],
        "compound symmetry": [("a", a, 3, "cs")],
        "homogeneous compound symmetry": [("a", a, 3, "homcs")],
        "two terms on one factor": [("a", a, 1, "us"), ("a", a, 2, "diag")],
        "nested": [("b", b, 1, "us"), ("a", a, 1, "us")],
        "nested three deep, slopes": [("a", a, 2, "us"), ("b", b, 2, "us"), ("g", g, 1, "us")],
        "crossed": [("a", a, 1, "us"), ("c", c, 1, "us")],
        "crossed slopes": [("a", a, 2, "us"), ("c", c, 2, "diag")],
        "nested and crossed": [("c", c, 2, "us"), ("b", b, 1, "us"), ("a", a, 2, "cs")],
        "two in the core": [("a", a, 1, "us"), ("c", c, 2, "us"), ("b2", (b + c) % 5, 1, "us")],
    }


def problem(d: Any, dense: int = 0) -> tuple[gram.Plan, gram.Units, gram.Gram, gram.Rhs]:
    """Plan, units and cross-products of a design; by default with as long a chain as it allows."""
    plan, standardised = gram.plan(d, dense), gram.standardise(d)
    return plan, standardised.units, *gram.crossproducts(d, plan, standardised)


def random_theta(d: Any, seed: int = 1) -> np.ndarray:
    """Some θ, in any units."""
    k = sum(covariance(t.cov, t.z.shape[1]).n_theta for t in d.terms)
    return np.random.default_rng(seed).normal(size=k) * 0.8


def dense(d: Any, lams: list[np.ndarray], sigma: float | None = None) -> dict[str, Any]:
    """Everything from V = W⁻¹ + Σ Z ΛΛ' Z', n x n, in the units of the data."""
    n, p, X = d.n, d.p, d.X
    Z = np.zeros((n, 0))
    G = np.zeros((0, 0))
    slices = []
    for t, lam in zip(d.terms, lams, strict=True):
        J, S = len(t.levels), t.z.shape[1]
        block = np.zeros((n, J, S))
        block[np.arange(n), t.codes] = t.z
        slices.append((Z.shape[1], J, S))
        Z = np.hstack([Z, block.reshape(n, J * S)])
        D = np.kron(np.eye(J), lam @ lam.T)
        G = np.block([[G, np.zeros((len(G), len(D)))], [np.zeros((len(D), len(G))), D]])
    V = np.diag(1 / d.weights) + Z @ G @ Z.T
    Vi = np.linalg.inv(V)
    y = d.y - d.offset
    xvx = X.T @ Vi @ X
    beta = np.linalg.solve(xvx, X.T @ Vi @ y)
    r = y - X @ beta
    r2 = r @ Vi @ r
    logdet, logdet_x = np.linalg.slogdet(V)[1], np.linalg.slogdet(xvx)[1]
    out: dict[str, Any] = {"beta": beta, "unscaled_vcov": np.linalg.inv(xvx), "r2": r2}
    for method, nu, extra in (("ML", n, 0.0), ("REML", n - p, logdet_x)):
        s2 = r2 / nu if sigma is None else sigma**2
        out[method] = logdet + extra + nu * np.log(2 * np.pi * s2) + r2 / s2
    b = G @ Z.T @ Vi @ r
    cov = G - G @ Z.T @ Vi @ Z @ G
    out["ranef"] = [b[at : at + J * S].reshape(J, S) for at, J, S in slices]
    out["ranef_cov"] = [
        np.stack(
            [cov[at + j * S : at + (j + 1) * S, at + j * S : at + (j + 1) * S] for j in range(J)]
        )
        for at, J, S in slices
    ]
    out["Z"], out["G"], out["Vi"] = Z, G, Vi
    return out
