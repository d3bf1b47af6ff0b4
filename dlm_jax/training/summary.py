"""What a run is, for people, before it trains: its model, objective and batch, and what of its text it will see."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.attention import BackendChoice
from dlm_jax.checkpoints import Pretrained
from dlm_jax.checkpoints.gguf_file import is_gguf
from dlm_jax.checkpoints.tokenizer import compared_file
from dlm_jax.data.config import DataConfig
from dlm_jax.data.rows import RowSource
from dlm_jax.data.tokenization import start_token
from dlm_jax.diffusion.config import DRAFT_LOSSES, ObjectiveConfig
from dlm_jax.models import DrafterConfig, ModelConfig, split_trainable
from dlm_jax.parallel import describe_mesh
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.flops import count_params

_SHOWN = 80  # characters of a text


def summary_lines(config: TrainConfig, base: Pretrained, mesh: Mesh, attention: BackendChoice, first_step: int,
                  changes: Sequence[str], damaged: Sequence[str]) -> list[str]:
    """Returns what the run is, for people; `damaged` says why it does not resume from a later checkpoint."""
    architecture, data = base.model.config, config.data
    tokens = data.batch_size * data.length
    lines = [
        f"model      {config.model.source} ({architecture.family}), {count_params(architecture) / 1e6:,.1f}M parameters"
        f", {config.model.init} weights",
        f"objective  {_describe_objective(config.objective, base.diffusion.mask_token_id)}",
        f"batch      {data.batch_size} x {data.length} = {tokens:,} tokens per step"
        + (f", in {config.optimizer.accumulate_steps} micro-batches" if config.optimizer.accumulate_steps > 1 else ""),
        f"run        {config.num_steps:,} steps, {config.num_steps * tokens:,} tokens",
        f"devices    {describe_mesh(mesh)}, {config.model.dtype}, "
        f"{attention.backend} attention" + (f" ({attention.reason})" if attention.reason else ""),
    ]
    if lora := base.model.lora:
        trained = sum(leaf.size for leaf in jax.tree.leaves(split_trainable(base.model)[1]))
        tables = "".join(f", all of the {name}" for name in ("embedding", "head") if getattr(lora, name))
        lines.insert(1, f"lora       rank {lora.rank} on {', '.join(lora.targets)}{tables}: {trained / 1e6:,.2f}M "
                        f"parameters are trained, frozen matrices are stored in {lora.frozen_dtype}")
    if config.objective.name == "drafter":
        trained = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(base.model.drafter)))
        lines.insert(1, f"drafter    {_describe_drafter(base.model.drafter.config, trained, architecture)}")
    lines += [f"damaged    {remark}, and has been moved to damaged/" for remark in damaged]
    if first_step:
        lines.append(f"resumed    from step {first_step:,}")
    return lines + [f"changed    {change}" for change in changes]


def _describe_objective(objective: ObjectiveConfig, mask_token_id: int | None) -> str:
    facts = [objective.name] + [f"mask token {mask_token_id}"] * (objective.name != "autoregressive")
    match objective.name:
        case "diffusion":
            facts.append(f"attention annealed over {objective.anneal_steps} steps" if objective.anneal_steps
                         else "attention bidirectional from the start")
        case "block_diffusion":
            sizes = [size for _, size in objective.block_size_schedule] or [objective.block_size]
            facts += [f"blocks of {' -> '.join(map(str, sizes))} tokens",
                      f"{objective.clean_attention} attention in clean blocks"]
        case "drafter":
            facts.append(f"{objective.drafts.num_anchors} blocks per row")
        case "self_drafting":
            facts.append(f"{objective.block_size - 1} drafts")
    if objective.trains_drafts:
        losses = {name: getattr(objective.drafts, name) for name in DRAFT_LOSSES}
        facts.append("loss " + ", ".join(f"{weight:g} {name}" for name, weight in losses.items() if weight))
    return ", ".join(facts + _other_terms(objective))


def _other_terms(objective: ObjectiveConfig) -> list[str]:
    """Returns what differs from the bound."""
    teacher, terms = objective.teacher, [f"noise {objective.noise}"] * (objective.noise != "rate")
    for name, weight, default in (
            ("cross-entropy of noised tokens", objective.noised_weight, 1.0), ("AR loss", objective.clean_weight, 0.0),
            ("entropy of right tokens", objective.confidence_weight, 0.0),
            (f"{teacher.divergence} from the parent", teacher.distribution_weight, 0.0),
            ("distance from the parent's states", teacher.hidden_weight, 0.0)):
        if weight != default:
            terms.append(f"{weight:g} x {name}")
    return terms


def _describe_drafter(config: DrafterConfig, num_params: int, target: ModelConfig) -> str:
    """Returns what a drafter is, for people."""
    parts = [f"{config.layers.num_layers} layers, {num_params / 1e6:,.2f}M parameters",
             f"guesses {config.num_drafts} tokens from layers {', '.join(map(str, config.target_layer_ids))} of "
             f"{target.num_layers}"]
    parts += [f"{config.markov_head} Markov head of rank {config.markov_rank}"] * (config.markov_rank > 0)
    parts += ["confidences"] * config.confidence_head
    parts += [f"convolutions over {config.conv_kernel_size} slots"] * (config.conv_kernel_size > 0)
    parts += [f"selector among {config.selector_top_k}"] * (config.selector_rank > 0)
    return ", ".join(parts)


def token_lines(data: DataConfig, base: Pretrained, rows: RowSource) -> list[str]:
    """Returns lines on the tokenizer, its special tokens, the first of the training rows, and what of it is scored."""
    tokenizer, name, source = base.tokenizer, compared_file(base.tokenizer), Path(base.tokenizer.name_or_path)
    if name is not None:
        check = f"text has the ids of {name}, as tested"
    else:
        check = f"as {source.name} describes it" if is_gguf(source) else "no file to compare it with"
    special = {"BOS": base.bos_token_id, "EOS": base.eos_token_id, "mask": base.diffusion.mask_token_id,
               "generation starts from": start_token(tokenizer, data.add_bos, data.packing)}
    named = ", ".join(f"{kind} {_describe_token(tokenizer, token)}" for kind, token in special.items())
    row = rows[np.arange(1)]
    tokens, scored = row.tokens[0].astype(int), np.ones(rows.length, bool)
    if row.noisable_mask is not None:
        scored &= row.noisable_mask[0]
    scored[0] = False  # position 0 is context
    lines = [f"tokenizer  {type(tokenizer).__name__}, {len(tokenizer):,} tokens; {check}", f"tokens     {named}",
             f"first row  {_decode(tokenizer, tokens)}"]
    if row.noisable_mask is None:
        return [*lines, "scored     all tokens of a row but the first"]
    return [*lines, f"scored     {scored.sum()} of its {len(scored)} tokens: {_decode(tokenizer, tokens[scored])}"]


def _describe_token(tokenizer: object, token: int | None) -> str:
    """Returns an id and its token."""
    return "none" if token is None else f"{token} {tokenizer.convert_ids_to_tokens(token)!r}"


def _decode(tokenizer: object, tokens: np.ndarray) -> str:
    """Returns the text of tokens in quotes, without its middle if it is long."""
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    half = _SHOWN // 2
    return repr(text) if len(text) <= _SHOWN else f"{text[:half]!r} ... {text[-half:]!r}"
