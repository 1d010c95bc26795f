"""mixedlm-rs: one grouping factor; prepared: the model object."""


def adapter(problem):
    import harness
    import mixedlm_rs

    group, re_formula = harness.one_factor(problem)
    data, reml = harness.read(problem), problem["method"] == "REML"

    def model():
        return mixedlm_rs.mixedlm(problem["fixed"], data, groups=group, re_formula=re_formula)

    def prepare():
        built = model()
        return lambda: -2 * built.fit(reml=reml).llf

    return harness.timings(problem, lambda: -2 * model().fit(reml=reml).llf, prepare)


if __name__ == "__main__":
    import harness

    harness.main(adapter)
