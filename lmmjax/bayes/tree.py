"""Posteriors as ArviZ data trees: names of dimensions and labels of coordinates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lmmjax.bayes.numpyro_model import Group, arrays, describe, groups, hierarchy, prior_sites
from lmmjax.precision import in_float64
from lmmjax.residual.subjects import errors

if TYPE_CHECKING:
    from xarray import DataTree

    from lmmjax.bayes.posterior import Posterior
    from lmmjax.design import Design


def _pairs(design: Design, g: Group) -> list[str]:
    """Labels of the correlations of a group, lower triangle column by column within each term."""
    out = []
    for position, k in enumerate(g.terms):
        if g.correlation(position):
            names = design.terms[k].names
            out += [
                f"{names[i]}.{names[j]}"
                for j, i in zip(*np.triu_indices(len(names), 1), strict=True)
            ]
    return out


def labels(design: Design) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Coordinates, and dimensions by variable (chain and draw aside)."""
    coords: dict[str, Any] = {"coef": list(design.x_names), "obs": np.asarray(design.rows)}
    dims = {"beta": ["coef"], "y": ["obs"], "weights": ["obs"], "offset": ["obs"]}
    for g in groups(design):
        terms = [design.terms[k] for k in g.terms]
        coords[g.name] = [str(level) for level in terms[0].levels]
        coords[f"{g.name}_term"] = [name for t in terms for name in t.names]
        dims[f"sd_{g.name}"] = [f"{g.name}_term"]
        dims[f"ranef_{g.name}"] = [g.name, f"{g.name}_term"]
        if g.has_correlations:
            coords[f"{g.name}_pair"] = _pairs(design, g)
            dims[f"cor_{g.name}"] = [f"{g.name}_pair"]
    return coords, dims


def _tree(design: Design, contents: dict[str, dict[str, np.ndarray]], attrs: Any = None) -> Any:
    from arviz_base import from_dict

    coords, dims = labels(design)
    return from_dict(contents, coords=coords, dims=dims, attrs=attrs)


def data_tree(posterior: Posterior) -> DataTree:
    """See :attr:`lmmjax.bayes.posterior.Posterior.data`."""
    from lmmjax.bayes.posterior import LOGLIK_NUMBERS

    design = posterior.model.design
    values = {k: v for k, v in posterior.values.items() if v.size}
    # ArviZ labels by the order of the dimensions of the whole data set: level before term
    values = dict(sorted(values.items(), key=lambda item: not item[0].startswith("ranef_")))
    contents = {"posterior": values, "sample_stats": posterior.stats}
    if posterior.chains * posterior.draws * design.n <= LOGLIK_NUMBERS:
        shape = (posterior.chains, posterior.draws, design.n)
        contents["log_likelihood"] = {"y": posterior._row_loglik().reshape(shape)}
    contents["observed_data"] = {"y": design.y}
    constant = {
        name: getattr(design, name)
        for name in ("weights", "offset")
        if getattr(design, f"has_{name}")
    }
    if constant:
        contents["constant_data"] = constant
    return _tree(design, contents, {"posterior": _attributes(posterior)})


def _attributes(posterior: Posterior) -> dict[str, Any]:
    """What the posterior group tells of how it was made; netCDF-friendly values."""
    import lmmjax

    return {
        "inference_library": "lmmjax",
        "inference_library_version": lmmjax.__version__,
        "formula": posterior.model.formula,
        "method": posterior.method,
        "priors": posterior.priors.describe(),
        "sampling_time": posterior.seconds,
        "tuning_steps": posterior.warmup,
        "seed": posterior.seed,
    }


def _grown(posterior: Posterior, contents: dict[str, dict[str, np.ndarray]]) -> DataTree:
    """The data tree with further groups; the posterior's own tree stays as it is."""
    tree = posterior.data.copy()
    added = _tree(posterior.model.design, contents)
    for name in contents:
        tree[name] = added[name]
    return tree


@in_float64
def with_posterior_predictive(posterior: Posterior, n: int | None, seed: int) -> DataTree:
    """See :meth:`lmmjax.bayes.posterior.Posterior.posterior_predictive`."""
    design, rng = posterior.model.design, np.random.default_rng(seed)
    per_chain = (
        posterior.draws if n is None else min(max(1, n // posterior.chains), posterior.draws)
    )
    keep = np.linspace(0, posterior.draws - 1, per_chain).round().astype(int)
    out = np.empty((posterior.chains, per_chain, design.n))
    sigma, phi = posterior.values["sigma"][:, keep], posterior.phi[:, keep]
    for c in range(posterior.chains):
        for at, d in enumerate(keep):
            one = slice(c * posterior.draws + d, c * posterior.draws + d + 1)
            out[c, at] = posterior._expected(one)[0]
        out[c] += errors(design, sigma[c], phi[c], rng.standard_normal(out[c].shape))
    return _grown(posterior, {"posterior_predictive": {"y": out}})


@in_float64
def with_prior(posterior: Posterior, n: int, seed: int) -> DataTree:
    """See :meth:`lmmjax.bayes.posterior.Posterior.prior_predictive`."""
    from numpyro.infer import Predictive

    model = posterior.model
    spec = describe(model, "noncentered", posterior.priors)
    sites = prior_sites(model, spec, posterior.priors)
    with jax.numpy_dtype_promotion("standard"):
        data = jax.tree.map(jnp.asarray, arrays(model, spec))
        sampler = Predictive(hierarchy, num_samples=n)
        drawn = sampler(jax.random.key(seed), spec, data, sites, obs=False)
        values = {k: np.asarray(v)[None] for k, v in drawn.items()}
    names = [k for k in posterior.values if k in values]
    contents = {
        "prior": {k: values[k] for k in names},
        "prior_predictive": {"y": values["y"]},
    }
    return _grown(posterior, contents)
