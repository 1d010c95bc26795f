"""Structured residual covariance: the language, the structures, and cross-products from them."""
