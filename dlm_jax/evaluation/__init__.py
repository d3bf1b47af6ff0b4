"""How good a model is: how probable it finds text, and how well it does tasks."""

from dlm_jax.evaluation.eval_model import EvalModel, GenerationRequest, Pair
from dlm_jax.evaluation.likelihood import BoundEstimate, BoundFn, autoregressive_nll, bound, make_bound_fn

__all__ = ["GenerationRequest", "BoundEstimate", "BoundFn", "EvalModel", "Pair", "autoregressive_nll", "bound",
           "make_bound_fn"]
