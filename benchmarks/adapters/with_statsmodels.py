"""statsmodels: one grouping factor (crossed ones need an n x n matrix); prepared: the model."""


def adapter(problem):
    import harness
    import statsmodels.formula.api as smf

    group, re_formula = harness.one_factor(problem)
    data, reml = harness.read(problem), problem["method"] == "REML"

    def model():
        return smf.mixedlm(problem["fixed"], data, groups=group, re_formula=re_formula)

    def prepare():
        built = model()
        return lambda: -2 * built.fit(reml=reml).llf

    return harness.timings(problem, lambda: -2 * model().fit(reml=reml).llf, prepare)


if __name__ == "__main__":
    import harness

    harness.main(adapter)
