"""Formulas against numbers computed by hand."""

import dataclasses
import math

import numpy as np
import pytest

from dlm_jax.data.config import DataConfig
from dlm_jax.models import ModelConfig
from dlm_jax.parallel.chips import CHIPS, Chip
from dlm_jax.plan.roofline import EFFICIENCY, Flops, estimate_time, scored_share, step_flops
from dlm_jax.training.config import ModelSource, ObjectiveConfig, TrainConfig
from dlm_jax.training.flops import peak_flops

# Blocks of 2 layers without biases: 4 x 8 x 8 for attention, 3 x 8 x 16 for the gated MLP, 16 for two norms.
MODEL = ModelConfig("llama", 100, 8, 2, 2, 2, 4, 16, 64)
BLOCKS = 2 * (4 * 8 * 8 + 3 * 8 * 16 + 2 * 8)
CONFIG = TrainConfig(model=ModelSource(source="x"), data=DataConfig(length=32, batch_size=4), num_steps=1000,
                     objective=ObjectiveConfig(name="autoregressive"))
TOKENS, PRODUCT = 128, 2 * 2 * 8 * 32 * 128  # of all heads over the full square, over all layers


def with_model(**changes) -> TrainConfig:
    return dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **changes))


def test_step_flops():
    model = 6 * BLOCKS * TOKENS + 6 * PRODUCT + 6 * 8 * 100 * TOKENS
    assert step_flops(CONFIG, MODEL, "xla") == Flops(model, model)
    assert step_flops(CONFIG, MODEL, "cudnn") == Flops(model, model + PRODUCT)
    assert step_flops(CONFIG, MODEL, "tpu") == Flops(model, model + 3 * PRODUCT)
    assert step_flops(with_model(remat="dots"), MODEL, "xla") == Flops(model, model + 2 * PRODUCT)
    assert step_flops(with_model(remat="full"), MODEL, "xla") == Flops(model, model + 2 * PRODUCT
                                                                       + 2 * BLOCKS * TOKENS)


@pytest.mark.parametrize(("objective", "share"), [
    (ObjectiveConfig(name="autoregressive"), 1), (ObjectiveConfig(), 0.5005),
    (ObjectiveConfig(schedule="cosine"), 2 / math.pi), (ObjectiveConfig(schedule="polynomial", power=2), 1 / 3),
    (ObjectiveConfig(time_curriculum=((0, 0.0, 1.0), (100, 0.2, 0.4))), 0.3)])
def test_scored_share(objective, share):
    assert scored_share(objective) == pytest.approx(share, abs=1e-3)


def test_estimate():
    chip = Chip("x", ("X",), flops=1e12, memory=16, memory_bandwidth=1e11, interconnect=1e10, network=1e9)
    time = estimate_time(CONFIG, Flops(6e12, 8e12), chip, 4, memory=5e10, interconnect=2e9, network=1e8)
    assert time.limits == pytest.approx({"compute": 2.0, "memory": 0.5, "interconnect": 0.2, "network": 0.1})
    assert [time.floor, time.seconds, time.ceiling] == pytest.approx([2.0, 2.5 / EFFICIENCY, 2.8 / EFFICIENCY])
    assert time.utilization == pytest.approx(6e12 / 4 / 1e12 / time.seconds)
    assert time.tokens_per_second == pytest.approx(TOKENS / time.seconds)
    assert [time.chip_hours, time.days] == pytest.approx([time.seconds * 4000 / 3600, time.seconds * 1000 / 86400])

    slow = estimate_time(CONFIG, Flops(6e12, 8e12), chip, 4, memory=5e10, interconnect=2e9, network=1e10)
    assert slow.floor == slow.seconds == 10 < slow.ceiling
    assert "network" not in estimate_time(CONFIG, Flops(1, 1), chip, 1, memory=1, interconnect=1, network=0).limits


def test_chips():
    kinds = [kind for chip in CHIPS for kind in chip.kinds]
    for i, kind in enumerate(kinds):  # no earlier, shorter name hides it
        assert not any(earlier in kind for earlier in kinds[:i]), kind
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    for chip in CHIPS:
        found = peak_flops(type("Device", (), {"device_kind": f"NVIDIA {chip.kinds[0]}"}))
        assert found == chip.flops and (chip.network is None or chip.network < chip.interconnect)
        assert 20 < chip.flops / chip.memory_bandwidth < 700  # FLOP per byte: no figure is off by 1000
    assert np.log10([chip.interconnect for chip in CHIPS]).min() > 10
