"""Profile likelihood intervals of sleepstudy: ``python -m benchmarks.profile``.

``Reaction ~ Days + (Days | Subject)``, all six parameters. "first" is the time from a fitted model
to its table with compilation; "warm" the same afterwards for other responses on the same design.
"""

from __future__ import annotations

import json
import time

FORMULA = "Reaction ~ Days + (Days | Subject)"


def measure(repeats: int = 5) -> dict[str, object]:
    """Times (s): the first table, and the least of ``repeats`` warm ones."""
    import numpy as np

    import lmmjax as lmm

    data, rng = lmm.load_dataset("sleepstudy"), np.random.default_rng(1)
    times = []
    for _ in range(1 + repeats):
        fit = lmm.Model(FORMULA, data).fit()
        mark = time.perf_counter()
        table = fit.confint("profile")
        times.append(time.perf_counter() - mark)
        data = data.assign(Reaction=fit.simulate(1, int(rng.integers(1000))).to_numpy().ravel())
    return {
        "what": "profile of sleepstudy",
        "parameters": len(table),
        "first": times[0],
        "warm": min(times[1:]),
        "warm_worst": max(times[1:]),
    }


def main() -> None:
    """Print one line."""
    print(json.dumps(measure()))


if __name__ == "__main__":
    main()
