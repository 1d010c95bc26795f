r"""An iterative engine for very large crossed factors, as a prototype held against the exact one.

    python -m benchmarks.iterative [--probes 256]

Intercept terms only, independent errors. With M = I + Λ'Z'ZΛ the criteria are

    ML    log|M| + n log(2π r²/n) + n
    REML  log|M| + log|X'V⁻¹X| + (n - p)(log(2π r²/(n - p)) + 1)

The largest factor (diagonal block) is eliminated exactly, which leaves the Schur complement S of
the others, never formed: S v = v + Λ(A - B'WB)Λv by sparse products. r² and X'V⁻¹X need p + 1
solves by conjugate gradients, and so do further factors of few levels, which join X in the
border. log|S| = Σ log s_jj + tr log A, A = S scaled to unit diagonal, is
estimated by stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017, SIAM J. Matrix Anal. Appl.
38(4)): Rademacher probes z, conjugate gradients on A x = z, whose coefficients are the Lanczos
matrix (Gardner et al. 2018, NeurIPS 31), and x serves the gradient. Gauss and Gauss-Radau rules
bracket z'log(A)z (Golub and Meurant 2010, ch. 6), so the error bar has two parts: the standard
error over probes, and the width of the bracket. z'(A - I)z, whose mean is known to be 0, is a
control variate. See docs/design for the reasons.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

LOG_2PI = float(np.log(2 * np.pi))


#: further factors of no more levels than this are treated like fixed effects: by exact solves
SMALL = 64


@dataclass(frozen=True)
class System:
    """Cross-products of a model with intercept terms: eliminated, iterated, and border columns.

    The largest factor is eliminated (J levels); the next, and others of more than ``SMALL`` levels,
    are iterated on (d levels); the border are the m columns of small factors, then X, then y.
    """

    counts: np.ndarray  # (J,) rows per level of the largest factor
    B: sp.csr_matrix  # (J, d)
    A: sp.csr_matrix  # (d, d)
    sizes: tuple[int, ...]  # levels of the iterated factors
    small: tuple[int, ...]  # levels of the factors in the border
    order: tuple[int, ...]  # positions in θ: eliminated, iterated, border
    border_big: np.ndarray  # (J, m), products with the border
    border_rest: np.ndarray  # (d, m)
    border: np.ndarray  # (m, m)
    n: int

    @property
    def q_small(self) -> int:
        """Columns of small factors in the border."""
        return sum(self.small)

    @classmethod
    def of(cls, model: Any) -> System:
        """From a model whose terms are intercepts."""
        design = model.design
        terms = design.terms
        if len(terms) < 2 or any(t.z.shape[1] != 1 or np.any(t.z != 1.0) for t in terms):
            raise ValueError("expected two or more (1 | g) terms; the prototype takes no others.")
        by_size = sorted(range(len(terms)), key=lambda k: -len(terms[k].levels))
        small = [k for k in by_size[2:] if len(terms[k].levels) <= SMALL]
        rest = [k for k in by_size[1:] if k not in small]
        big, iterated = _one_hot([terms[by_size[0]]]), _one_hot([terms[k] for k in rest])
        Xy = np.column_stack([design.X, design.y])
        Y = np.column_stack([_one_hot([terms[k]]).toarray() for k in small] + [Xy])
        return cls(
            np.asarray(big.sum(axis=0)).ravel(),
            (big.T @ iterated).tocsr(),
            (iterated.T @ iterated).tocsr(),
            tuple(len(terms[k].levels) for k in rest),
            tuple(len(terms[k].levels) for k in small),
            (by_size[0], *rest, *small),
            big.T @ Y,
            iterated.T @ Y,
            Y.T @ Y,
            len(design.y),
        )


def _one_hot(terms: list[Any]) -> sp.csr_matrix:
    rows = np.arange(len(terms[0].codes))
    shapes = [(len(rows), len(t.levels)) for t in terms]
    ones = np.ones(len(rows))
    parts = [
        sp.csr_matrix((ones, (rows, t.codes)), shape=shape)
        for t, shape in zip(terms, shapes, strict=True)
    ]
    return sp.hstack(parts).tocsr()


class Operator:
    """S scaled to unit diagonal, and what surrounds it, at one θ."""

    def __init__(self, system: System, theta: np.ndarray) -> None:
        self.system = system
        self.big = float(theta[system.order[0]])
        split = 1 + len(system.sizes)
        self.lam = np.repeat(theta[list(system.order[1:split])], system.sizes)
        self.lam_small = np.repeat(theta[list(system.order[split:])], system.small)
        self.pivot = 1 + self.big**2 * system.counts
        self.w = self.big**2 / self.pivot
        squares = system.B.copy()
        squares.data **= 2
        self.diagonal = 1 + self.lam**2 * (system.A.diagonal() - squares.T @ self.w)
        self.scale = 1 / np.sqrt(self.diagonal)

    def schur(self, v: np.ndarray) -> np.ndarray:
        """(A - B'WB) v."""
        s = self.system
        return s.A @ v - s.B.T @ (self.w[:, None] * (s.B @ v))

    def __call__(self, v: np.ndarray) -> np.ndarray:
        """The scaled operator on the columns of v."""
        outer = (self.scale * self.lam)[:, None]
        return (self.scale**2)[:, None] * v + outer * self.schur(outer * v)

    @property
    def floor(self) -> float:
        """A lower bound of the spectrum: S is at least I."""
        return 1 / float(self.diagonal.max())


class Solved(NamedTuple):
    """Solutions of A x = b, and the Lanczos matrices of each column."""

    x: np.ndarray  # (d, m)
    diagonal: np.ndarray  # (m, k)
    off: np.ndarray  # (m, k); the last couples to the vector that would come next
    residual: float  # largest, relative


def conjugate_gradients(operator: Any, b: np.ndarray, tol: float, most: int = 500) -> Solved:
    """Solve for all columns at once; their coefficients are the Lanczos matrices (mBCG)."""
    x, r = np.zeros_like(b), b.copy()
    p, rr = r.copy(), np.sum(b * b, axis=0)
    start = np.where(rr > 0, rr, 1.0)
    alphas: list[np.ndarray] = []
    betas: list[np.ndarray] = []
    while len(alphas) < most:
        q = operator(p)
        alpha = rr / np.maximum(np.sum(p * q, axis=0), 1e-300)
        x += alpha * p
        r -= alpha * q
        new = np.sum(r * r, axis=0)
        beta = new / np.maximum(rr, 1e-300)
        alphas.append(alpha)
        betas.append(beta)
        p, rr = r + beta * p, new
        if np.all(rr <= tol**2 * start):
            break
    a, c = np.array(alphas).T, np.array(betas).T
    diagonal = 1 / a
    diagonal[:, 1:] += c[:, :-1] / a[:, :-1]
    return Solved(x, diagonal, np.sqrt(c) / a, float(np.sqrt(np.max(rr / start))))


def quadrature(solved: Solved, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """z'log(A)z / z'z per probe: Gauss rule (an upper bound) and Gauss-Radau rule (a lower one).

    log has negative even and positive odd derivatives, hence the signs of both errors.
    """
    m, k = solved.diagonal.shape
    T = np.zeros((m, k + 1, k + 1))
    i = np.arange(k)
    T[:, i, i] = solved.diagonal
    T[:, i, i + 1] = T[:, i + 1, i] = solved.off
    e, Q = np.linalg.eigh(T[:, :k, :k])
    upper = np.sum(Q[:, 0] ** 2 * np.log(e), axis=1)
    # prescribe the node ``floor``: (T - floor I) δ = β² e_k
    shifted = T[:, :k, :k] - floor * np.eye(k)
    last = np.zeros((m, k, 1))
    last[:, -1, 0] = solved.off[:, -1] ** 2
    T[:, k, k] = floor + np.linalg.solve(shifted, last)[:, -1, 0]
    e, Q = np.linalg.eigh(T)
    lower = np.sum(Q[:, 0] ** 2 * np.log(np.maximum(e, floor)), axis=1)
    return lower, upper


class Estimate(NamedTuple):
    """A number with the standard error over probes and the width of its quadrature bracket."""

    value: float
    se: float
    bracket: float
    samples: np.ndarray  # (m,), their mean is ``value``


def with_control(samples: np.ndarray, control: np.ndarray) -> np.ndarray:
    """Samples less the multiple of a control of mean 0 that explains most of their variance.

    The multiple for one half of the samples comes from the other half. Taken from the same samples
    it would bias their mean by more than a standard error when they are few (seen with 16 probes).
    """
    spread = float(np.sum((control - control.mean()) ** 2))
    if len(samples) < 8 or spread <= 1e-16 * float(samples @ samples):
        return samples
    half = np.arange(len(samples)) % 2 == 0
    out = samples.copy()
    for mine, other in ((half, ~half), (~half, half)):
        c = control[other] - control[other].mean()
        out[mine] -= (c @ samples[other]) / (c @ c) * control[mine]
    return out


def logdet(operator: Operator, probes: np.ndarray, tol: float) -> tuple[Estimate, Solved]:
    """Σ log(pivots) + Σ log(diagonal of S) + tr log A: log|M| without the small factors."""
    fixed = float(np.sum(np.log(operator.pivot)) + np.sum(np.log(operator.diagonal)))
    solved = conjugate_gradients(operator, probes, tol)
    lower, upper = quadrature(solved, operator.floor)
    size = np.sum(probes**2, axis=0)
    control = size * (solved.diagonal[:, 0] - 1)  # z'(A - I)z
    samples = fixed + with_control(size * upper, control)
    se = float(np.std(samples, ddof=1) / np.sqrt(len(samples)))
    width = float(np.mean(size * np.abs(upper - lower)))
    return Estimate(float(samples.mean()), se, width, samples), solved


def random_probes(d: int, m: int, seed: int) -> np.ndarray:
    """Rademacher probes: of all choices with unit covariance they have the least variance."""
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(d, m))


class Border(NamedTuple):
    """The part without randomness, by solves for the m columns of the border.

    ``T`` are Z_k'V⁻¹[X y] by position in θ; ``T_small`` and Q give the border's own share of the
    log-determinant and of its gradient.
    """

    logdet: float  # log|I + Λ G Λ|, G = Z_small'V₋⁻¹Z_small, V₋ without the small factors
    S: np.ndarray  # (p + 1, p + 1), [X y]'V⁻¹[X y]
    T: dict[int, np.ndarray]
    slope: dict[int, float]  # of ``logdet`` and, for small factors, of all of log|M|


def solve_border(operator: Operator, theta: np.ndarray, tol: float) -> Border:
    """Exact to the tolerance of the solves: m right-hand sides, then dense (m, m) algebra."""
    s = operator.system
    reduced = s.border_rest - s.B.T @ (operator.w[:, None] * s.border_big)
    outer = (operator.scale * operator.lam)[:, None]
    u = outer * conjugate_gradients(operator, outer * reduced, tol).x
    G = s.border - s.border_big.T @ (operator.w[:, None] * s.border_big) - reduced.T @ u
    # Z_k'V₋⁻¹ of the border, the eliminated factor by back-substitution
    T_big = (s.border_big - s.B @ u) / operator.pivot[:, None]
    T_rest = np.split(reduced - operator.schur(u), np.cumsum(s.sizes)[:-1])
    T = dict(zip(s.order[: 1 + len(s.sizes)], [T_big, *T_rest], strict=True))
    return _eliminate_small(s, operator.lam_small, theta, 0.5 * (G + G.T), T)


def _eliminate_small(
    s: System, lam: np.ndarray, theta: np.ndarray, G: np.ndarray, T: dict[int, np.ndarray]
) -> Border:
    q = s.q_small
    inner = np.eye(q) + lam[:, None] * G[:q, :q] * lam
    Q = lam[:, None] * np.linalg.solve(inner, np.diag(lam)) if q else np.zeros((0, 0))
    QG = Q @ G[:q]
    full = G - G[:q].T @ QG  # [Z_small X y]'V⁻¹[Z_small X y]
    slope = {k: -2 * theta[k] * float(np.sum((t[:, :q] @ Q) * t[:, :q])) for k, t in T.items()}
    T = {k: t[:, q:] - t[:, :q] @ QG[:, q:] for k, t in T.items()}
    ends = np.cumsum((0, *s.small))
    for j, k in enumerate(s.order[1 + len(s.sizes) :]):
        part = slice(ends[j], ends[j + 1])
        slope[k] = 2 * theta[k] * float(np.trace(full[part, part]))
        T[k] = full[part, q:]
    return Border(float(np.linalg.slogdet(inner)[1]), full[q:, q:], T, slope)


def known_part(border: Border, n: int, method: str) -> tuple[float, float, np.ndarray, int]:
    """What the border adds to log|M| in the criterion; r², β̂ and ν."""
    p = len(border.S) - 1
    beta = np.linalg.solve(border.S[:p, :p], border.S[:p, p])
    r2 = float(border.S[p, p] - border.S[:p, p] @ beta)
    nu = n - (p if method == "REML" else 0)
    known = border.logdet + nu * (LOG_2PI + np.log(r2 / nu)) + nu
    if method == "REML":
        known += float(np.linalg.slogdet(border.S[:p, :p])[1])
    return known, r2, beta, nu


def criterion(
    system: System,
    theta: np.ndarray,
    method: str,
    probes: np.ndarray,
    tol: float = 1e-8,
    solve_tol: float = 1e-12,
) -> tuple[Estimate, np.ndarray, np.ndarray]:
    """-2 log-likelihood with its error bar, and its gradient with standard errors.

    Parameters
    ----------
    system : System
    theta : array (k,)
        Relative standard deviations, terms in formula order.
    method : {"ML", "REML"}
    probes : array (d, m)
    tol, solve_tol : float
        Relative residual at which conjugate gradients stop, for the probes and for the border.
    """
    operator = Operator(system, theta)
    log_m, solved = logdet(operator, probes, tol)
    border = solve_border(operator, theta, solve_tol)
    known, r2, beta, nu = known_part(border, system.n, method)
    samples = log_m.samples + known
    total = Estimate(float(samples.mean()), log_m.se, log_m.bracket, samples)
    slopes = logdet_gradient(operator, probes, solved)
    gradient = slopes.mean(axis=1) + _known_gradient(border, theta, beta, r2, nu, method)
    return total, gradient, np.std(slopes, axis=1, ddof=1) / np.sqrt(probes.shape[1])


def _known_gradient(
    border: Border, theta: np.ndarray, beta: np.ndarray, r2: float, nu: int, method: str
) -> np.ndarray:
    """What r², log|X'V⁻¹X| and the border add to the gradient; ∂V/∂θ_k = 2 θ_k Z_k Z_k'."""
    p = len(beta)
    v = np.append(-beta, 1.0)
    inverse = np.linalg.inv(border.S[:p, :p])
    out = np.empty(len(theta))
    for k, T in border.T.items():
        slope = nu / r2 * np.sum((T @ v) ** 2)
        if method == "REML":
            slope += np.sum((T[:, :p] @ inverse) * T[:, :p])
        out[k] = border.slope[k] - 2 * theta[k] * slope
    return out


def logdet_gradient(operator: Operator, probes: np.ndarray, solved: Solved) -> np.ndarray:
    """Hutchinson's tr(S⁻¹ ∂S/∂θ_k), and the pivots' share, from the same solves: (k, m).

    Rows of small factors are 0: their share is exact and part of the border.
    """
    s, scale = operator.system, operator.scale[:, None]
    left, right = scale * solved.x, scale * probes
    lam = operator.lam[:, None]
    inside_left, inside_right = operator.schur(lam * left), operator.schur(lam * right)
    out = np.zeros((len(s.order), probes.shape[1]))
    ends = np.cumsum((0, *s.sizes))
    for j, position in enumerate(s.order[1 : 1 + len(s.sizes)]):
        part = slice(ends[j], ends[j + 1])
        out[position] = np.sum(left[part] * inside_right[part], axis=0)
        out[position] += np.sum(inside_left[part] * right[part], axis=0)
    # ∂W/∂θ = 2 θ / pivot², and the pivots' own log-determinant
    slope = 2 * operator.big / operator.pivot**2
    inner = np.sum((s.B @ (lam * left)) * slope[:, None] * (s.B @ (lam * right)), axis=0)
    own = float(np.sum(2 * operator.big * s.counts / operator.pivot))
    out[s.order[0]] = own - inner
    return out


# -------------------------------------------------------------------------------------------------
# Against the exact engine
# -------------------------------------------------------------------------------------------------

#: multiples of the ML optimum at which both engines are compared, and one point far away
FACTORS = ((1.0, 1.0, 1.0), (0.5, 1.0, 2.0), (2.0, 0.5, 1.0), (1.0, 1.0, 0.0))


def measure(probes: int = 256, seed: int = 0) -> list[dict[str, Any]]:
    """Both engines on InstEval at several θ: values, error bars, gradients, times."""
    import jax

    import lmmjax as lmm

    with lmm.float64():
        formula = "y ~ service + (1 | s) + (1 | d) + (1 | dept)"
        model = lmm.Model(formula, lmm.load_dataset("InstEval"))
        best = model.fit(method="ML").theta
        points = [np.asarray(best) * f for f in FACTORS] + [np.ones(3)]
        system = System.of(model)
        z = random_probes(sum(system.sizes), probes, seed)
        rows: list[dict[str, Any]] = []
        for method in ("ML", "REML"):
            exact = jax.jit(lambda t, how=method: model.deviance(t, how))
            slope = jax.jit(jax.grad(lambda t, how=method: model.deviance(t, how)))
            for theta in points:
                rows.append(_row(system, theta, method, z, exact, slope))
    rows[0]["calibration"] = calibration(system, points[0], rows[0]["exact"])
    return rows


def calibration(system: System, theta: np.ndarray, exact: float, sets: int = 200) -> list[float]:
    """Error / SE of the ML criterion for many independent sets of 32 probes."""
    operator = Operator(system, theta)
    known = known_part(solve_border(operator, theta, 1e-12), system.n, "ML")[0]
    out = []
    for seed in range(sets):
        probes = random_probes(sum(system.sizes), 32, 1000 + seed)
        total, _ = logdet(operator, probes, 1e-8)
        out.append((total.value + known - exact) / total.se)
    return out


def _row(
    system: System, theta: np.ndarray, method: str, z: np.ndarray, exact: Any, slope: Any
) -> dict[str, Any]:
    start = time.perf_counter()
    total, gradient, gradient_se = criterion(system, theta, method, z)
    seconds = time.perf_counter() - start
    float(exact(theta))  # compiles
    start = time.perf_counter()
    value = float(exact(theta))
    return {
        "theta": theta.tolist(),
        "method": method,
        "exact": value,
        "value": total.value,
        "se": total.se,
        "bracket": total.bracket,
        "seconds": seconds,
        "exact_seconds": time.perf_counter() - start,
        "gradient": gradient.tolist(),
        "gradient_se": gradient_se.tolist(),
        "exact_gradient": np.asarray(slope(theta)).tolist(),
        "probes": z.shape[1],
    }


def section(rows: list[dict[str, Any]] | None) -> list[str]:
    """The part of the page, empty where nothing was measured."""
    if not rows:
        return []
    from benchmarks.page import seconds, table

    z = rows[0]["calibration"]
    cells = []
    for r in rows:
        bar = r["se"] + r["bracket"]
        worst = max(
            abs(a - b) / c
            for a, b, c in zip(r["gradient"], r["exact_gradient"], r["gradient_se"], strict=True)
            if c > 0
        )
        cells.append(
            [
                r["method"],
                ", ".join(f"{t:.4f}" for t in r["theta"]),
                f"{r['exact']:.4f}",
                f"{r['value']:.4f}",
                f"{r['se']:.4f}",
                f"{r['bracket']:.0e}",
                f"{(r['value'] - r['exact']) / bar:+.2f}",
                f"{worst:.2f}",
                seconds(r["seconds"]),
                seconds(r["exact_seconds"]),
            ]
        )
    head = ["criterion", "θ (s, d, dept)", "exact", "iterative", "SE", "bracket"]
    head += ["error / bar", "gradient: worst error / SE", "time", "exact: time"]
    return [
        "## Iterative engine (prototype) on InstEval",
        "",
        f"{rows[0]['probes']} probes, the same at every θ; value and gradient. The error bar is "
        "the standard error over probes plus the width of the quadrature bracket; the exact "
        "engine's time is that of a value. At this size the exact engine is the right one; the "
        "prototype is here to be right.",
        "",
        f"Calibration of the bar: over {len(z)} independent sets of 32 probes at the ML optimum, "
        f"error / SE has mean {np.mean(z):+.2f} and SD {np.std(z, ddof=1):.2f}; "
        f"{np.mean(np.abs(z) < 2):.0%} are below 2.",
        "",
        *table(head, cells),
    ]


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.iterative")
    parser.add_argument("--probes", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.probes, options.seed)
    print(json.dumps(rows) if options.json else "\n".join(section(rows)))


if __name__ == "__main__":
    main()
