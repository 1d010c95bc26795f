"""Frequentist inference on a fit: one idea a file, all of it from cross-products.

linear          variances and covariances as parameters in which V is linear
information     first and second derivatives of log|V| and [X y]'V⁻¹[X y] in them
kenward_roger   adjusted covariance, degrees of freedom and scaled F
containment     nlme's inner-outer degrees of freedom
hypothesis      t and F for any Lβ = c by any of the methods
words           hypotheses in words, "MachineB - MachineC = 0"
anova           hypotheses of types I, II and III by term
grid, means     reference grids; marginal means, contrasts, trends; adjust: multiplicity
components      Wald tests of variance components
explained       R², intraclass correlation, shares of variance
robust          sandwich covariance by group with Bell-McCaffrey degrees of freedom
methods         the methods of a fit that ask these
"""
