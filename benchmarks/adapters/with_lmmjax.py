"""lmmjax; beside the common figures, what only it has: build, compilation, tests, evaluations."""

import time


def adapter(problem):
    import harness

    import lmmjax as lmm

    data = harness.read(problem)

    def frame():
        return lmm.Model(problem["formula"], data).fit(method=problem["method"]).deviance

    def prepare():
        model = lmm.Model(problem["formula"], data)
        return lambda: model.fit(method=problem["method"]).deviance

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

    def read_off():
        fit = model.fit(method=problem["method"])
        return (fit.beta, fit.sigma, fit.theta, fit.deviance)[-1]

    if problem["runs"]:
        # results are put into the units of the data when asked for: all that a fit estimates
        out["read"] = harness.repeat(read_off, problem["runs"])["warm"]
    if problem["tests"]:
        start = time.perf_counter()
        fit.coef_table()
        out["tests"] = time.perf_counter() - start
    return out


if __name__ == "__main__":
    import harness

    harness.main(adapter)
