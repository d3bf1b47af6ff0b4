"""A drafter beside the model it is trained for: new, with copies of its layers, or as a run records it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.checkpoints import Pretrained
from dlm_jax.checkpoints.drafter import resolve_drafter
from dlm_jax.checkpoints.workdir import DrafterRecord
from dlm_jax.diffusion import DraftObjective
from dlm_jax.errors import ConfigError
from dlm_jax.models import DraftedModel, Drafter, DrafterConfig, Transformer, abstract_drafter
from dlm_jax.parallel import param_shardings
from dlm_jax.training.config import TrainConfig


def add_drafter(base: Pretrained, config: TrainConfig, mesh: Mesh, record: DrafterRecord | None) -> Pretrained:
    """Returns the base with a drafter beside it: a new one, or as shapes the one that a run records.

    Raises:
      ConfigError: the drafter's architecture does not fit its losses, the target or the mask token.
    """
    target = base.model
    if record is not None:
        drafter = abstract_drafter(record.config, target.compute, config.model.param_dtype)
        return dataclasses.replace(base, model=DraftedModel(target, drafter))
    mask_token_id = base.diffusion.mask_token_id
    if base.new_mask_token:
        raise ConfigError(f"a drafter's blocks consist of the target's own embeddings, and {base.source} has none for "
                          "a new mask token; set model.mask_token to a token of its vocabulary that no text has")
    if mask_token_id == getattr(base.tokenizer, "pad_token_id", None):
        raise ConfigError(f"the mask token {mask_token_id} also pads texts; set model.mask_token to a token of the "
                          "vocabulary that no text has")
    drafter_config = resolve_drafter(config.drafter, target.config, mask_token_id)
    check_losses(config.objective.drafts, drafter_config)
    dtype, copies = jnp.dtype(config.model.param_dtype), config.drafter.init == "target"
    shardings = param_shardings(abstract_drafter(drafter_config, target.compute, config.model.param_dtype), mesh)

    @functools.partial(jax.jit, out_shardings=shardings)
    def initialize(seed: jax.Array, target: nnx.State) -> nnx.State:
        drafter = Drafter(drafter_config, rngs=nnx.Rngs(jax.random.key(seed)), compute=compute, param_dtype=dtype)
        if copies:
            copy_layers(nnx.merge(target_graph, target), drafter)
        return nnx.state(drafter)

    compute, (target_graph, target_state) = target.compute, nnx.split(target)
    params = initialize(config.seed, target_state if copies else nnx.State({}))
    drafter = nnx.merge(nnx.graphdef(abstract_drafter(drafter_config, compute, config.model.param_dtype)), params)
    return dataclasses.replace(base, model=DraftedModel(target, drafter))


def copy_layers(target: Transformer, drafter: Drafter) -> None:
    """Sets a drafter's layers and final norm to the target's last ones.

    They expect the residual stream of those layers, normed: what is fused begins as that of the last tapped layer.
    """
    number, embed = drafter.config.layers.num_layers, target.config.hidden_size
    dtype = drafter.fc.kernel.dtype
    layers = jax.tree.map(lambda x: x[-number:].astype(dtype), nnx.state(target.blocks))
    nnx.update(drafter.blocks, layers)
    nnx.update(drafter.final_norm, jax.tree.map(lambda x: x.astype(dtype), nnx.state(target.final_norm)))
    drafter.hidden_norm.scale.set_value(layers["attention_norm"]["scale"][...][0])
    drafter.fc.kernel.set_value(jnp.zeros(drafter.fc.kernel.shape, dtype).at[-embed:].set(jnp.eye(embed, dtype=dtype)))


def check_losses(objective: DraftObjective, config: DrafterConfig) -> None:
    """Raises ConfigError where a part of the drafter has no loss, or a loss no part."""
    for loss, part, exists in (("confidence", "confidence_head", config.confidence_head),
                               ("selector", "selector_rank", config.selector_rank > 0)):
        if (getattr(objective, loss) > 0) != exists:
            raise ConfigError(f"objective.drafts.{loss} is {getattr(objective, loss)}, and drafter.{part} "
                              f"{getattr(config, part)}; set both or neither")
