"""mixedlm; nothing prepared, since its ``refit`` starts from the optimum of the first fit."""


def adapter(problem):
    import harness
    import mixedlm

    data, reml = harness.read(problem), problem["method"] == "REML"

    def frame():
        return mixedlm.lmer(problem["formula"], data, REML=reml).get_deviance()

    return harness.timings(problem, frame, None)


if __name__ == "__main__":
    import harness

    harness.main(adapter)
