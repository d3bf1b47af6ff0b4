"""lm-eval's own client of this protocol, asking the server: choices, log-likelihoods and texts of our evaluation."""

import dataclasses

import pytest
from lm_eval.models.openai_completions import LocalCompletionsAPI

from dlm_jax import DiffusionLM
from dlm_jax.checkpoints import load_pretrained
from dlm_jax.diffusion import BlockSpec
from dlm_jax.evaluation.lm_eval import LmEvalAdapter
from dlm_jax.evaluation.make_eval_model import make_eval_model
from dlm_jax.sampling import SamplerConfig
from dlm_jax.serving.engine import Engine
from tests.evaluation.conftest import SHIPPED, harness_folder  # noqa: F401
from tests.evaluation.lm_eval_tasks import by_hand, evaluate
from tests.sampling.tiny_models import random_model
from tests.serving.conftest import serving


