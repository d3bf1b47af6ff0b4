"""How good a model is."""

from dlm_jax.evaluation.likelihood import BoundEstimate, BoundFn, autoregressive_nll, bound, make_bound_fn

__all__ = ["BoundEstimate", "BoundFn", "autoregressive_nll", "bound", "make_bound_fn"]
