"""The load-balancing loss in training."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dlm_jax.models import ExpertsConfig
from tests.training.steps import one_device
from tests.training.test_step import MODEL, train

EXPERTS = ExpertsConfig(8, 2)


@functools.cache
def records(coefficient, accumulate=1, steps=6):
    experts = dataclasses.replace(EXPERTS, router_aux_loss_coef=coefficient)
    model = dataclasses.replace(MODEL, positions="rope", gated_mlp=True, experts=experts, residual_dropout=0.0,
                                embed_dropout=0.0, attention_dropout=0.0)
    return train(one_device(), steps=steps, model=model, accumulate_steps=accumulate, learning_rate=3e-2)[0]


def test_loss_has_its_term_and_training_balances():
    without, with_term = records(0.0), records(1.0)
    first, same = with_term[0], without[0]
    assert first["router_balance"] == same["router_balance"] > 1
    np.testing.assert_allclose(first["loss"] - same["loss"], EXPERTS.num_experts_per_tok * first["router_balance"],
                               rtol=1e-5)
    assert first["bound"] == same["bound"]
    assert with_term[-1]["router_balance"] < without[-1]["router_balance"]
    assert with_term[-1]["router_max_load"] < without[-1]["router_max_load"]
    assert 0 <= first["router_unused"] < 1


def test_micro_batches_have_their_own_balance():
    one, two = records(1.0)[0], records(1.0, accumulate=2, steps=1)[0]
    np.testing.assert_allclose([one[name] for name in ("bound", "router_max_load", "router_unused")],
                               [two[name] for name in ("bound", "router_max_load", "router_unused")], rtol=1e-5)
    assert two["router_balance"] == pytest.approx(one["router_balance"], rel=0.05)
    assert all(np.isfinite(jax.tree.leaves(two)))
