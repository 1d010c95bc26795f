"""glmm, without its Satterthwaite pass; prepared: plain columns instead of a data frame."""


def adapter(problem):
    import glmm
    import harness

    data, reml = harness.read(problem), problem["method"] == "REML"

    def fit(table):
        result = glmm.fit(table, problem["formula"], reml=reml, satterthwaite=False)
        return -2 * result.loglik

    def prepare():
        columns = {c: data[c] if c in problem["categories"] else data[c].to_numpy() for c in data}
        return lambda: fit(columns)

    return harness.timings(problem, lambda: fit(data), prepare)


if __name__ == "__main__":
    import harness

    harness.main(adapter)
