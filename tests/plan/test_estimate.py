"""Times against numbers computed by hand; memory against real arrays."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from dlm_jax.checkpoints import DrafterSettings, resolve_lora
from dlm_jax.data.config import DataConfig
from dlm_jax.diffusion import DraftObjective, ObjectiveConfig, TeacherObjective
from dlm_jax.models import Compute, ModelConfig, abstract_model, base_shapes, split_trainable
from dlm_jax.parallel import MeshConfig, make_mesh
from dlm_jax.parallel.chips import Chip
from dlm_jax.plan import Base, gpu_target
from dlm_jax.plan.collectives import collectives
from dlm_jax.plan.compile import abstract_state, device_bytes, trace_step
from dlm_jax.plan.estimate import (
    EFFICIENCY,
    Flops,
    activation_bytes,
    estimate_memory,
    estimate_time,
    scored_share,
    step_flops,
)
from dlm_jax.training.config import ModelSource, TrainConfig
from dlm_jax.training.flops import has_parent_pass
from dlm_jax.training.optimizer import make_optimizer
from dlm_jax.training.state import Frozen, create_state
from tests.plan.conftest import with_values

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
    assert [time.floor, time.seconds] == pytest.approx([2.0, 2.5 / EFFICIENCY])
    assert time.utilization == pytest.approx(6e12 / 4 / 1e12 / time.seconds)
    assert time.tokens_per_second == pytest.approx(TOKENS / time.seconds)
    assert [time.chip_hours, time.days] == pytest.approx([time.seconds * 4000 / 3600, time.seconds * 1000 / 86400])

    slow = estimate_time(CONFIG, Flops(6e12, 8e12), chip, 4, memory=5e10, interconnect=2e9, network=1e10)
    assert slow.floor == slow.seconds == 10
    assert "network" not in estimate_time(CONFIG, Flops(1, 1), chip, 1, memory=1, interconnect=1, network=0).limits


MESH, WIDE = MeshConfig(data=2, fsdp=4), MeshConfig(data=8)


def trained_and_frozen(config, base):
    lora = resolve_lora(config.lora, base.config, base.new_mask_token)
    return split_trainable(abstract_model(base.config, lora=lora))[1:]


@pytest.mark.parametrize("changes", [
    {"optimizer": {"name": "adamw", "ema_decay": 0.9}}, {"optimizer": {"name": "adafactor"}},
    {"optimizer": {"name": "muon"}}, {"lora": {"rank": 4, "embedding": False}}], ids=str)
def test_state_bytes(config, base, changes):
    config = with_values(config, **changes)
    params, frozen = (jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), tree)
                      for tree in trained_and_frozen(config, base))
    state = create_state(params, make_optimizer(config.optimizer, 100), config.optimizer.ema_decay > 0,
                         make_mesh(MESH), frozen=Frozen(frozen))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert device_bytes(abstract_state(config, base, make_mesh(MESH))) == held


def estimated(config, base):
    """Returns the estimate for eight GPUs with cuDNN's attention, by component."""
    return estimate_memory(config, base, gpu_target(config, base.config, "h100:8")).breakdown


def test_teacher_is_counted(config, base):
    """A forward pass and its head in FLOPs; a copy of the parameters, and the parent's states, in memory."""
    taught = with_values(config, objective={"teacher": TeacherObjective(distribution_weight=1.0, hidden_weight=1.0)})
    plain, more = (estimated(with_values(one, mesh={"data": 8}), base) for one in (config, taught))
    params = trained_and_frozen(config, base)[0]
    copy = 2**30 * (more["state"] - plain["state"])
    assert copy == pytest.approx(sum(leaf.size for leaf in jax.tree.leaves(params)) * (
        2 if config.model.dtype == "bfloat16" else 4), rel=0.02)  # norms stay float32
    assert more["activations"] > plain["activations"] > 0 and more["working"] > plain["working"]
    flops = [step_flops(one, base.config, "cudnn").model for one in (config, taught)]
    assert 1.2 < flops[1] / flops[0] < 1.4
    gated = with_values(taught, lora={"rank": 4, "where": "noised", "embedding": False},
                        objective={"name": "block_diffusion", "block_size": 4, "anneal_steps": 0})
    assert not has_parent_pass(base.config, gated.objective, config.data.length,
                               resolve_lora(gated.lora, base.config, False))


def test_lora_state_and_gradients(config, base):
    small = with_values(config, lora={"rank": 4, "embedding": False})
    full, less, table = (estimated(with_values(one, mesh={"data": 8}), base)
                         for one in (config, small, with_values(config, lora={"rank": 4})))
    trained = sum(4 * leaf.size for leaf in jax.tree.leaves(trained_and_frozen(small, base)[0]))
    assert less["gradients"] == pytest.approx(2 * trained / 2**30)  # summed over micro-batches, in float32
    assert less["state"] < 0.3 * full["state"]
    assert less["state"] < table["state"] < full["state"]  # the mask token is new, so the table is trained


@pytest.mark.parametrize("kind, bits", [("int8", 8.5), ("nf4", 4.5)])
def test_quantized_base_bytes(config, base, kind, bits):
    def state(frozen_dtype, mesh):
        small = with_values(config, lora={"rank": 4, "frozen_dtype": frozen_dtype})
        return device_bytes(abstract_state(small, base, make_mesh(mesh)))

    _, stored = base_shapes(base.config, Compute(), "float32", None)
    kernels = sum(leaf.size for path, leaf in nnx.to_flat_state(stored)
                  if path[0] == "blocks" and path[-1] == "kernel")
    saved = state("bfloat16", WIDE) - state(kind, WIDE)
    assert saved == kernels * (16 - bits) / 8
    split = MeshConfig(data=4, fsdp=2)  # between the two blocks of 128
    assert state("bfloat16", split) - state(kind, split) == saved / 2
    small = with_values(config, lora={"rank": 4, "frozen_dtype": kind}, model={"remat": "none"})
    plain = with_values(small, lora={"frozen_dtype": "bfloat16"})
    assert activation_bytes(small, base, "cudnn", "none") == activation_bytes(plain, base, "cudnn", "none")


def test_quantized_base_sends_no_more(config, base):
    def sent(frozen_dtype):
        one = with_values(config, lora={"rank": 4, "frozen_dtype": frozen_dtype, "targets": ("q", "out")},
                          model={"remat": "full"}, optimizer={"accumulate_steps": 1},
                          data={"batch_size": 8, "length": 256})
        program, = trace_step(one, base, make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]), "xla")
        return sum(c.sent for c in collectives(program.lower().compile().as_text(), 2) if c.kind == "all-gather")

    assert 0 < sent("nf4") <= sent("bfloat16")


def test_activations_by_rematerialization(config, base):
    kept = {remat: activation_bytes(config, base, "cudnn", remat) for remat in ("none", "dots", "full")}
    assert kept["none"] > kept["dots"] > kept["full"]
    inputs = 3 * 128 * 128 * 2  # of each layer, [length, embed] in bfloat16
    assert inputs <= kept["full"] < 1.01 * inputs  # and the seeds of dropout
    squares = 3 * 4 * 128 * 128 * 4  # of each layer, [heads, length, length] in float32: no backend stores them
    assert abs(activation_bytes(config, base, "xla", "none") - kept["none"]) < squares / 4


def test_estimate_scales(config, base):
    def memory(**groups):
        return estimated(with_values(config, **{"mesh": {"data": 2}} | groups), base)

    plain = memory()
    assert memory(data={"batch_size": 64})["activations"] == pytest.approx(2 * plain["activations"])
    assert memory(optimizer={"accumulate_steps": 4})["activations"] == pytest.approx(plain["activations"] / 2)
    assert memory(optimizer={"accumulate_steps": 1})["gradients"] == pytest.approx(plain["gradients"] / 2)
    assert memory(model={"param_dtype": "bfloat16"})["state"] == pytest.approx(plain["state"] / 2, rel=1e-3)
    sharded = memory(mesh={"data": 1})
    assert sharded["state"] == pytest.approx(plain["state"] / 2, rel=0.05)
    assert sharded["activations"] == plain["activations"]


def product_flops(jaxpr):
    """Returns the FLOPs of all matrix products of a traced program; a conditional counts as its larger branch."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [getattr(one, "jaxpr", one) for one in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
            if hasattr(getattr(one, "jaxpr", one), "eqns")]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif equation.primitive.name == "cond":
            total += max(map(product_flops, inner))
        else:
            total += equation.params.get("length", 1) * sum(map(product_flops, inner))
    return total


@pytest.mark.parametrize("losses", [dict(cross_entropy=0.1, l1=0.9, confidence=1.0), dict()], ids=["dspark", "dflash"])
def test_flops_of_a_drafter_are_those_of_its_program(losses):
    settings = dict(markov_rank=16, confidence_head=True, sample_from_anchor=True) if losses else {}
    config = dataclasses.replace(
        with_values(CONFIG, data=dict(batch_size=4, length=64)),
        objective=ObjectiveConfig("drafter", drafts=DraftObjective(num_anchors=8, **losses)),
        drafter=DrafterSettings(num_layers=2, num_target_layers=2, block_size=5, **settings))
    model = ModelConfig("llama", 500, 64, 6, 4, 2, 16, 128, 64)
    traced, = trace_step(config, Base(model, 3), make_mesh(MeshConfig(), jax.devices()[:1]), "xla")
    found = step_flops(config, model, "xla")
    assert found.model == found.executed == pytest.approx(product_flops(traced.jaxpr.jaxpr), rel=0.1)
    assert 0.2 < found.target / found.model < 0.8
