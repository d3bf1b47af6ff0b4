"""How good a model is: how probable it finds text, and how well it does tasks."""

from dlm_jax.evaluation.eval_model import EvalModel, GenerationRequest, Pair
from dlm_jax.evaluation.likelihood import BoundEstimate, autoregressive_nll, bound

__all__ = ["BoundEstimate", "EvalModel", "GenerationRequest", "Pair", "autoregressive_nll", "bound"]
