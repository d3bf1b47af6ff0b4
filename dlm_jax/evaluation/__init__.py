"""How good a model is: how probable it finds text, and how well it does tasks."""

from dlm_jax.evaluation.candidate import Blank, Candidate, Pair
from dlm_jax.evaluation.likelihood import BoundEstimate, BoundFn, autoregressive_nll, bound, make_bound_fn

__all__ = ["Blank", "BoundEstimate", "BoundFn", "Candidate", "Pair", "autoregressive_nll", "bound", "make_bound_fn"]
