"""What is added up without compiling, against arrays that exist and against each other."""

import dataclasses

import jax
import pytest
from flax import nnx

from dlm_jax.checkpoints import resolve_lora
from dlm_jax.models import Compute, Transformer, base_shapes, split_trainable
from dlm_jax.parallel import MeshConfig, make_mesh
from dlm_jax.plan.collectives import collectives
from dlm_jax.plan.memory import add_up, kept_bytes, placed_bytes
from dlm_jax.plan.program import planned_state, trace_step
from dlm_jax.plan.targets import described_mesh
from dlm_jax.training.optimizer import make_optimizer
from dlm_jax.training.step import create_state

MESH = MeshConfig(data=2, fsdp=4)


def changed(config, **groups):
    return dataclasses.replace(config, **{
        group: dataclasses.replace(getattr(config, group), **values) for group, values in groups.items()})


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_the_state_is_as_large_as_the_one_that_training_makes(config, base, name):
    config = changed(config, optimizer={"name": name, "ema_decay": 0.9})
    params = nnx.state(Transformer(base.config, rngs=nnx.Rngs(0)))
    state = create_state(params, make_optimizer(config.optimizer, 100), True, make_mesh(MESH))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert placed_bytes(planned_state(config, base, described_mesh(MESH, 8))) == held


def test_with_lora_the_state_has_moments_and_gradients_of_what_is_trained(config, base):
    small = changed(config, lora={"rank": 4, "embedding": False})
    lora = resolve_lora(small.lora, base.config, base.new_mask_token)
    model = Transformer(base.config, rngs=nnx.Rngs(0), lora=lora)
    _, params, frozen = split_trainable(model)
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    state = create_state(params, make_optimizer(small.optimizer, 100), False, make_mesh(MESH), frozen=frozen)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert placed_bytes(planned_state(small, base, described_mesh(MESH, 8))) == held
    full, less = (add_up(one, base, described_mesh(MeshConfig(data=8), 8), "cudnn") for one in (config, small))
    assert less.gradients == pytest.approx(2 * trained / 2**30)  # summed over micro-batches, in float32
    assert less.state < 0.3 * full.state
    with_table = add_up(changed(config, lora={"rank": 4}), base, described_mesh(MeshConfig(data=8), 8), "cudnn")
    assert less.state < with_table.state < full.state  # the mask token is new, and so its table is trained


@pytest.mark.parametrize("kind, bits", [("int8", 8.5), ("nf4", 4.5)])
def test_a_quantized_base_takes_its_codes_and_a_scale_for_each_64(config, base, kind, bits):
    def state(frozen_dtype, mesh):
        small = changed(config, lora={"rank": 4, "frozen_dtype": frozen_dtype})
        return placed_bytes(planned_state(small, base, described_mesh(mesh, 8)))

    _, stored = base_shapes(base.config, Compute(), "float32", None)
    kernels = sum(leaf.size for path, leaf in nnx.to_flat_state(stored)
                  if path[0] == "blocks" and path[-1] == "kernel")
    saved = state("bfloat16", MeshConfig(data=8)) - state(kind, MeshConfig(data=8))
    assert saved == kernels * (16 - bits) / 8
    split = MeshConfig(data=4, fsdp=2)  # between the two blocks of 128
    assert state("bfloat16", split) - state(kind, split) == saved / 2
    small = changed(config, lora={"rank": 4, "frozen_dtype": kind}, model={"remat": "none"})
    plain = changed(small, lora={"frozen_dtype": "bfloat16"})
    assert kept_bytes(small, base, "cudnn", "none") == kept_bytes(plain, base, "cudnn", "none")


def test_a_quantized_base_is_gathered_no_more_often_than_another(config, base):
    def sent(frozen_dtype):
        one = changed(config, lora={"rank": 4, "frozen_dtype": frozen_dtype}, model={"remat": "full"},
                      optimizer={"accumulate_steps": 1}, data={"batch_size": 8, "length": 256})
        program, = trace_step(one, base, make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]), "xla")
        return sum(c.sent for c in collectives(program.lower().compile().as_text(), 2) if c.kind == "all-gather")

    assert 0 < sent("nf4") <= sent("bfloat16")


def test_activations_are_those_of_the_rematerialisation(config, base):
    kept = {remat: kept_bytes(config, base, "cudnn", remat) for remat in ("none", "dots", "full")}
    assert kept["none"] > kept["dots"] > kept["full"]
    inputs = 3 * 128 * 128 * 2  # of each layer, [length, embed] in bfloat16
    assert inputs <= kept["full"] < 1.01 * inputs  # and the seeds of dropout
    squares = 3 * 4 * 128 * 128 * 4  # of each layer, [heads, length, length] in float32
    assert kept_bytes(config, base, "xla", "none") >= kept["none"] + squares / 2


def test_parts_grow_and_shrink_with_what_they_depend_on(config, base):
    def parts(mesh: MeshConfig = MESH, devices: int = 8, **groups):
        return add_up(changed(config, **groups), base, described_mesh(mesh, devices), "cudnn")

    whole = parts()
    assert parts(data={"batch_size": 64}).activations == pytest.approx(2 * whole.activations)
    assert parts(optimizer={"accumulate_steps": 4}).activations == pytest.approx(whole.activations / 2)
    assert parts(optimizer={"accumulate_steps": 1}).gradients == pytest.approx(whole.gradients / 2)
    assert parts(model={"param_dtype": "bfloat16"}).state == pytest.approx(whole.state / 2, rel=1e-3)
    wide = parts(MeshConfig(fsdp=8))
    assert wide.state == pytest.approx(whole.state / 2, rel=0.05) and wide.activations == whole.activations
    assert whole.total == pytest.approx(whole.state + whole.gradients + whole.activations + whole.working)
