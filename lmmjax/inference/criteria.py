"""Information criteria of several fits side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lmmjax.errors import ComparisonError
from lmmjax.inference.nesting import (
    check_converged,
    check_fitted,
    check_same_data,
    keeps_rows,
    label,
)

if TYPE_CHECKING:
    import pandas as pd

    from lmmjax.fit import Fit

COLUMNS = ("n_params", "loglik", "aic", "aicc", "bic")


def aic_table(*fits: Fit | Mapping[str, Fit], **named: Fit) -> pd.DataFrame:
    """Compare fits, nested or not, by information criteria.

    Parameters
    ----------
    *fits, **named : Fit
        Fits, or dicts of fits by name: of the same rows and response, by one method. REML fits
        must have the same X. Models of
        ``Model.from_table`` keep no rows: what is compared is the number of rows, the text of
        response and offset, the sum of the log weights and, under REML, the names of the columns
        of X. That they are of one table is for the caller to know.

    Returns
    -------
    DataFrame
        Index: the names or formulas, in the order given. ``n_params loglik aic aicc bic``;
        ``delta``, the difference from the smallest AIC; ``weight``, Akaike weights.
        n = rows in AICc and BIC.

    Raises
    ------
    ComparisonError
        Criteria that cannot be compared: ML with REML, REML with different fixed parts, different
        rows or responses, fits that did not converge.

    References
    ----------
    Burnham and Anderson (2002). Model Selection and Multimodel Inference, eqs 2.7 and 2.9.

    Examples
    --------
    >>> import lmmjax as lmm
    >>> data = lmm.load_dataset("Dyestuff")
    >>> formulas = ("Yield ~ 1", "Yield ~ 1 + (1 | Batch)")
    >>> table = lmm.aic_table(*(lmm.Model(f, data).fit(method="ML") for f in formulas))
    >>> table["delta"].round(2).tolist()
    [3.4, 0.0]
    """
    import pandas as pd

    rows = _labelled((*fits, named))
    found = tuple(fit for _, fit in rows)
    if not found:
        raise ComparisonError("found no fits; expected one or more. Call aic_table(fit1, fit2).")
    check_fitted(found)
    if any(keeps_rows(f) for f in found):
        check_same_data(found)
    else:
        _check_same_sums(found)
    check_converged(found)
    _check_criteria(found)
    table = pd.DataFrame(
        {name: [getattr(f, name) for f in found] for name in COLUMNS},
        index=pd.Index([name or label(f) for name, f in rows], name="model"),
    )
    table["delta"] = table["aic"] - table["aic"].min()
    relative = np.exp(-0.5 * table["delta"])
    table["weight"] = relative / relative.sum()
    return table


def _labelled(given: tuple[Fit | Mapping[str, Fit], ...]) -> list[tuple[str | None, Fit]]:
    """Fits with their names, where they have any."""
    rows: list[tuple[str | None, Fit]] = []
    for one in given:
        rows += [(str(k), f) for k, f in one.items()] if isinstance(one, Mapping) else [(None, one)]
    return rows


def _check_same_sums(fits: tuple[Fit, ...]) -> None:
    """Refuse models of streamed tables whose numbers of rows, responses ... differ."""

    def of(fit: Fit) -> dict[str, Any]:
        design = fit.model.design
        products: Any = fit.model._prepared[2]
        return {
            "numbers of rows": design.n,
            "responses": design.response,
            "offsets": (design.spec.offset, design.spec.parsed.offset_nodes),
            # added up in batches, whose size differs between models
            "weights": float(f"{float(products[0].logdet_R):.8g}"),
        }

    first = of(fits[0])
    for fit in fits[1:]:
        for name, value in of(fit).items():
            if value != first[name]:
                raise ComparisonError(
                    f"found different {name} ({first[name]} and {value}); expected the same in all "
                    "models, and one table of complete rows for all of them."
                )


def _check_criteria(fits: tuple[Fit, ...]) -> None:
    methods = sorted({f.method for f in fits})
    if len(methods) > 1:
        raise ComparisonError(
            "found fits by ML and by REML, whose likelihoods are of different data; expected one "
            "criterion. Refit: fit.model.fit(method='ML')."
        )
    if not keeps_rows(fits[0]):
        same = len({f.model.design.x_names for f in fits}) == 1
    else:
        X = [f.model.design.X for f in fits]
        same = all(np.array_equal(X[0], x) for x in X[1:])
    if methods == ["REML"] and not same:
        raise ComparisonError(
            "found REML fits with different fixed parts (or codings of them), whose criteria are "
            "not comparable; expected the same columns of X. Refit by ML: "
            "fit.model.fit(method='ML')."
        )
