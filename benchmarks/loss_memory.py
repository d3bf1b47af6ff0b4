"""How much memory the fused loss saves against full logits: in loss and gradients, and in the training step.

    python benchmarks/loss_memory.py                                                       compiled for this CPU
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/loss_memory.py --topology=v5e:2x2     for one TPU chip

GPT-2 small, 8 x 1024, in float32 and in bfloat16. "Full logits" is the plain function: logits [batch, length, vocab] of
all positions and their log_softmax. "Loss" is the loss with its gradients by hidden states and head, "step" a
training step with AdamW. Nothing runs: prints XLA's memory analysis of the compiled programs, temporary memory and
(for a TPU, where it decides whether a program fits) the peak, and adds it to benchmarks/results/loss_memory.json.
A TPU is compiled for without one; that needs `pip install jax[tpu]`.
"""

import dataclasses
from unittest import mock

import harness
import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from dlm_jax.checkpoints import config_from_hf
from dlm_jax.diffusion import Batch, HeadPlan, LossSums, LossWeights, NoisyBatch, ObjectiveConfig, loss_sums
from dlm_jax.models import Compute, ModelConfig, abstract_model
from dlm_jax.parallel import ATTENTION_PARTITION, MeshConfig, array_sharding, make_mesh
from dlm_jax.parallel.chips import GIB
from dlm_jax.training import diffusion_loss
from dlm_jax.training.optimizer import OptimizerConfig, make_optimizer
from dlm_jax.training.state import state_layout
from dlm_jax.training.step import make_train_step

ROWS, LENGTH = 8, 1024


def full_loss_sums(hidden: jax.Array, kernel: jax.Array, plan: HeadPlan, batch: NoisyBatch, *,
                   weights: LossWeights | None = None, teacher: None = None,
                   distance: None = None, shift: bool = True) -> LossSums:
    """Computes `loss_sums` from the logits of all positions."""
    logits = jnp.einsum("ble,ve->blv", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    weights, skip = batch.weights if weights is None else weights.noised, int(shift)
    logits, weights = logits[:, :LENGTH - skip], weights[:, skip:]
    targets, loss_mask = batch.targets[:, skip:], batch.loss_mask[:, skip:]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0] * loss_mask
    correct = (jnp.argmax(logits, axis=-1) == targets) & loss_mask
    loss = jnp.sum(weights * nll)
    return dataclasses.replace(
        LossSums.zero(), loss=loss, weighted_nll=jax.lax.stop_gradient(loss), nll=jnp.sum(nll),
        correct=jnp.sum(correct.astype(jnp.float32)), num_scored=jnp.sum(loss_mask.astype(jnp.float32)),
        num_noisable=jnp.sum(batch.noisable_mask.astype(jnp.float32)))


def array(mesh: Mesh, dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=array_sharding(mesh, *(None for _ in shape)))


def lower_loss(config: ModelConfig, mesh: Mesh, dtype: str, loss: object) -> jax.stages.Lowered:
    rows = ROWS, LENGTH
    batch = NoisyBatch(array(mesh, "int32", *rows), array(mesh, "int32", *rows), array(mesh, "bool", *rows),
                           array(mesh, "bool", *rows), array(mesh, "float32", *rows))
    gradient = jax.jit(jax.value_and_grad(lambda hidden, kernel, batch: loss(hidden, kernel, HeadPlan(0), batch).loss,
                                          argnums=(0, 1)))
    return gradient.lower(array(mesh, dtype, *rows, config.hidden_size),
                          array(mesh, "float32", config.vocab_size, config.hidden_size), batch)


def lower_step(config: ModelConfig, mesh: Mesh, dtype: str, loss: object, attention: str) -> jax.stages.Lowered:
    graphdef, params = nnx.split(abstract_model(config, Compute(dtype, "none", attention, ATTENTION_PARTITION)))
    optimizer_config = OptimizerConfig(schedule="constant")
    optimizer = make_optimizer(optimizer_config, 1000)
    step = make_train_step(graphdef, optimizer, mesh, objective=ObjectiveConfig(), config=optimizer_config,
                                       num_steps=1000, seed=0, mask_token_id=811)
    batch = Batch(array(mesh, "int32", ROWS, LENGTH), array(mesh, "bool", ROWS, LENGTH), array(mesh, "uint32", ROWS))
    with jax.set_mesh(mesh), mock.patch.object(diffusion_loss, "loss_sums", loss):
        return step.lower(state_layout(params, optimizer, False, mesh), batch)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--topology", default="", help="a TPU slice, such as v5e:2x2; its first chip is used")
    args = parser.parse_args()
    tpu = args.topology
    devices = topologies.get_topology_desc(platform="tpu", topology_name=tpu).devices if tpu else jax.devices("cpu")
    mesh = make_mesh(MeshConfig(), devices[:1])
    config = config_from_hf(harness.HF_CONFIGS["gpt2-small"])
    results = []
    print(f"GPT-2 small, {ROWS} x {LENGTH}, {devices[0].device_kind}; GiB\n\n"
          "| program | type | loss | temp | peak | arguments |\n| --- | --- | --- | --- | --- | --- |")
    for program in ("loss", "step"):
        for dtype in ("float32", "bfloat16"):
            for name, loss in (("full logits", full_loss_sums), ("fused", loss_sums)):
                lowered = (lower_loss(config, mesh, dtype, loss) if program == "loss" else
                           lower_step(config, mesh, dtype, loss, "tpu" if tpu else "xla"))
                try:
                    memory = lowered.compile().memory_analysis()
                except jax.errors.JaxRuntimeError as error:  # it does not fit, and XLA says by how much
                    print(f"| {program} | {dtype} | {name} | {str(error).splitlines()[0]} |")
                    continue
                row = {"program": program, "dtype": dtype, "loss": name, "temp_gib": memory.temp_size_in_bytes / GIB,
                       "peak_gib": memory.peak_memory_in_bytes / GIB if tpu else None,
                       "argument_gib": memory.argument_size_in_bytes / GIB}
                results.append(row)
                peak = f"{row['peak_gib']:.2f}" if tpu else ""
                print(f"| {program} | {dtype} | {name} | {row['temp_gib']:.2f} | {peak} | {row['argument_gib']:.2f} |",
                      flush=True)
    known = [entry for entry in harness.read_json("loss_memory", []) if entry["device"] != devices[0].device_kind]
    versions = harness.versions("jax", "libtpu") if tpu else harness.versions("jax")
    harness.write_json("loss_memory", [*known, {"device": devices[0].device_kind, "rows": ROWS, "length": LENGTH,
                                                "results": results, "versions": versions}])


if __name__ == "__main__":
    main()
