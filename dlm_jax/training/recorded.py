"""A recipe and its source: what the recipe leaves open is as the source records, what it says otherwise is refused.

A source records how it was trained: a workdir and an export in config.json and beside it, an adapter in its folder.
This is the one place that compares it with a recipe. What is open (None) and not recorded has its field's default.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dlm_jax.config_fields import settle
from dlm_jax.data.config import DataConfig, ExampleConfig
from dlm_jax.data.tokenization import start_token
from dlm_jax.diffusion.config import ObjectiveConfig, OpenObjective
from dlm_jax.errors import ConfigError
from dlm_jax.training.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dlm_jax.checkpoints import Pretrained


def default_mask_token(config: TrainConfig) -> int | str | None:
    """Returns the mask token for a base that records none; autoregressive training needs none."""
    return None if config.objective.name == "autoregressive" else config.model.default_mask_token


def settle_run(config: TrainConfig, base: "Pretrained") -> TrainConfig:
    """Returns the config of a new run that starts from `base`, with nothing left open.

    Raises:
      ConfigError: it says otherwise than the base records; both are named.
    """
    if config.model.init != "pretrained":  # only the shape of the base is used
        return settle_resumed(config, {})
    model, mask_token = config.model, base.recorded_mask_token
    if mask_token is not None and base.diffusion.mask_token_id != mask_token:
        raise _contradiction(base.source, "model.mask_token", mask_token, model.mask_token)
    if (model.mask_token, mask_token) == (None, None):
        found = model.default_mask_token if base.new_mask_token else base.diffusion.mask_token_id
        model = dataclasses.replace(model, mask_token=found)
    data = config.data
    if base.tokenizer is not None:
        data = settle_data(data, base.recipe or {}, base.tokenizer, base.source)
    return dataclasses.replace(config, model=model, data=data, objective=_settle_objective(config.objective, base))


def settle_resumed(config: TrainConfig, saved: Mapping[str, Any]) -> TrainConfig:
    """Returns the config of a run as it goes on: what it leaves open is as saved, by dotted keys.

    What it says otherwise is for `config_changes` to judge.
    """
    model, data, objective = config.model, config.data, config.objective
    if model.mask_token is None:
        model = dataclasses.replace(model, mask_token=saved.get("model.mask_token"))
    examples = settle(data.examples, ExampleConfig, _group(saved, "data.examples.", ("separator", "split_digits")))
    add_bos = saved.get("data.add_bos") if data.add_bos is None else data.add_bos
    if isinstance(objective, OpenObjective):
        objective = objective.settle(_group(saved, "objective.", ("name", "shift", "block_size", "clean_attention")))
    return dataclasses.replace(config, model=model, objective=objective,
                               data=dataclasses.replace(data, add_bos=add_bos, examples=examples))


def settle_data(data: DataConfig, recipe: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase",
                source: str) -> DataConfig:
    """Returns the settings of a run's data for a source that was trained by `recipe` ({} where unknown).

    Raises:
      ConfigError: they say otherwise than the recipe about position 0 or the prompts of examples.
    """
    if "data.packing" in recipe:
        recorded = start_token(tokenizer, recipe.get("data.add_bos"), recipe["data.packing"])
        if (start := start_token(tokenizer, data.add_bos, data.packing)) != recorded:
            if data.add_bos is not None:
                raise ConfigError(f"{source} was trained with token {recorded} at position 0, but with data.add_bos "
                                  f"{data.add_bos} it is {start}; set data.add_bos to none, which takes what is "
                                  "recorded")
            data = dataclasses.replace(data, add_bos=recorded == tokenizer.bos_token_id)
    return dataclasses.replace(data, examples=_settle_examples(data.examples, recipe, tokenizer, source))


def _settle_examples(examples: ExampleConfig, recipe: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase",
                     source: str) -> ExampleConfig:
    prefix, used = "data.examples.", recipe.get("data.examples.format", "none")
    if "none" in (used, examples.format):  # running text is not prompted
        return settle(examples, ExampleConfig, {})
    if _way_of_asking(used) != _way_of_asking(examples.format):
        raise ConfigError(f"{source} was trained on prompts of the format {used}, but {prefix}format is "
                          f"{examples.format}, which writes them otherwise; use examples of the former format, or the "
                          "model from before that training")
    if used == "messages":
        from dlm_jax.data.chat_template import ChatTemplate

        if examples.chat_template and ChatTemplate(tokenizer, examples.chat_template).template != (
                tokenizer.chat_template):
            raise ConfigError(f"{source} was trained with the chat template of its tokenizer, but "
                              f"{prefix}chat_template is {examples.chat_template}, which differs; set it to none, "
                              "which takes the former")
        return settle(examples, ExampleConfig, {})
    recorded = _group(recipe, prefix, ("separator", "split_digits"))
    for name, value in recorded.items():
        _check_open(source, prefix + name, value, getattr(examples, name))
    return settle(examples, ExampleConfig, recorded)


def _settle_objective(objective: ObjectiveConfig, base: "Pretrained") -> ObjectiveConfig:
    diffusion, recorded = base.diffusion, {}
    is_adapted = base.recorded_mask_token is not None
    if is_adapted or not diffusion.shift:
        recorded["shift"] = diffusion.shift
    if objective.name == "autoregressive":  # the baseline, whatever blocks the base writes in
        _check_open(base.source, "objective.shift", recorded.get("shift", True), True)
    elif is_adapted and diffusion.blocks is not None:
        recorded |= {"name": "block_diffusion", "block_size": diffusion.blocks.size,
                     "clean_attention": diffusion.blocks.clean_attention}
    for name, value in recorded.items():
        stated = getattr(objective, name)
        if name == "block_size" and objective.block_size_schedule:
            stated = objective.block_size_schedule[0][1]  # blocks may grow from the recorded size
        _check_open(base.source, f"objective.{name}", value, stated,
                    "; blocks that grow from it are in objective.block_size_schedule" * (name == "block_size"))
    return objective.settle(recorded) if isinstance(objective, OpenObjective) else objective


def _way_of_asking(format_name: str) -> str:
    """Returns what decides the text of a prompt: Alpaca's, a chat template, or the prompt as it is."""
    return format_name if format_name in ("messages", "alpaca") else "plain"


def _group(settings: Mapping[str, Any], prefix: str, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: settings[prefix + name] for name in names if settings.get(prefix + name) is not None}


def _check_open(source: str, key: str, recorded: object, stated: object, more: str = "") -> None:
    if stated is not None and stated != recorded:
        raise _contradiction(source, key, recorded, stated, more)


def _contradiction(source: str, key: str, recorded: object, stated: object, more: str = "") -> ConfigError:
    return ConfigError(f"{source} was trained with {key} {recorded!r}, but the recipe or a flag sets it to {stated!r}; "
                       f"set it to none, which takes what is recorded{more}")
