"""lme-python on a polars frame with text groups (its own form); prepared: ``prepare_lmer``."""


def adapter(problem):
    import harness
    import lme_python
    import polars as pl

    reml = problem["method"] == "REML"
    data = pl.from_pandas(harness.read(problem))
    data = data.with_columns([pl.col(t["group"]).cast(pl.String) for t in problem["terms"]])
    response = problem["fixed"].split("~")[0].strip()

    def frame():
        fit = lme_python.lmer(problem["formula"], data=data, reml=reml)
        return fit.diagnostics["objective"]

    def prepare():
        prepared = lme_python.prepare_lmer(problem["formula"], data)
        y = data[response].to_list()
        return lambda: prepared.fit(y=y, reml=reml).diagnostics["objective"]

    return harness.timings(problem, frame, prepare)


if __name__ == "__main__":
    import harness

    harness.main(adapter)
