"""lmmjax; beside the common figures, what only it has: build, compilation, tests, evaluations."""

import time


def adapter(problem):
    import harness

    import lmmjax as lmm

    data = harness.read(problem)

    def read_off(fit):
        # results may be computed when asked for: ask for all that a fit estimates
        estimates = (fit.beta, fit.sigma, fit.theta, fit.deviance)
        return estimates[-1]

    def frame():
        return read_off(lmm.Model(problem["formula"], data).fit(method=problem["method"]))

    def prepare():
        model = lmm.Model(problem["formula"], data)
        return lambda: read_off(model.fit(method=problem["method"]))

    out = harness.timings(problem, frame, prepare)
    return out | own(problem, data) if "built" in out else out


def own(problem, data):
    """Time to build, number of evaluations, first table with Satterthwaite's df (small data)."""
    import lmmjax as lmm

    start = time.perf_counter()
    model = lmm.Model(problem["formula"], data)
    model.theta0  # noqa: B018, the cross-products are made when first asked for
    build = time.perf_counter() - start
    fit = model.fit(method=problem["method"])
    out = {"build": build, "evaluations": int(fit.n_evals)}
    if problem["tests"]:
        start = time.perf_counter()
        fit.coef_table()
        out["tests"] = time.perf_counter() - start
    return out


if __name__ == "__main__":
    import harness

    harness.main(adapter)
