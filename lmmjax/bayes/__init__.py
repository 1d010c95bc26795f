"""The Bayesian half: the model under priors, sampled and summarised.

    priors.py         which distribution each parameter has, in words and as NumPyro objects
    charts.py         coordinates for the sampler that fit the units of the data
    numpyro_model.py  the same model in three parametrisations, as NumPyro functions
    nuts.py           the compiled sampling loop
    draws.py          exact draws of β and b, and log-likelihoods, from draws of the rest
    posterior.py      the frozen result
    text.py           the result for people

Nothing here is imported by ``import lmmjax``; NumPyro and ArviZ load on first use.
"""
