"""GPBoost: maximum likelihood, independent random coefficients; from arrays made of the frame."""


def adapter(problem):
    import gpboost
    import harness
    import numpy as np
    import pandas as pd

    if problem["method"] != "ML":
        raise harness.CannotError("maximum likelihood only")
    if harness.correlated_slopes(problem):
        raise harness.CannotError("no correlation between intercept and slope")
    data = harness.read(problem)
    response = problem["fixed"].split("~")[0].strip()

    def frame():
        groups = data[[t["group"] for t in problem["terms"]]].astype(str).to_numpy()
        X = np.ones((len(data), 1))
        if problem["covariates"]:
            used = pd.get_dummies(data[problem["covariates"]], drop_first=True, dtype=float)
            X = np.column_stack([X, used])
        model = gpboost.GPModel(group_data=groups, likelihood="gaussian", num_parallel_threads=1)
        model.fit(data[response].to_numpy(float), X=X)
        return 2 * model.get_current_neg_log_likelihood()

    return harness.timings(problem, frame, None)


if __name__ == "__main__":
    import harness

    harness.main(adapter)
