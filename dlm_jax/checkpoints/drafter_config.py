"""config.json of a drafter in the layouts of others, to and from DrafterConfig.

`dflash` and `dflash2` are z-lab's, `dspark` is DeepSpec's, and files of vllm-project/speculators can be read. They say
the same in several places: at the top level or in `dflash_config`. What a file says twice must agree, and a setting
that changes the computation and that this library does not implement is refused. Layer id L is the output of layer L in
the first three, and its input in speculators.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlm_jax.checkpoints.hf_config import config_from_hf, config_to_hf
from dlm_jax.checkpoints.settings import check_implemented, require
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.models import DrafterConfig, ModelConfig, spread_layer_ids
from dlm_jax.storage import read_json

ARCHITECTURES = {"dflash": "DFlashDraftModel", "dspark": "Qwen3DSparkModel", "dflash2": "DFlash2DraftModel"}

# The settings that only one layout has.
_HEADS = {
    "dflash": (),
    "dspark": ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov"),
    "dflash2": ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"),
}
# Settings that other code implements and this library does not, with the values that have no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "output_multiplier": (None, 1), "final_logit_softcapping": (None, 0), "input_embedding_scale": (None, 1),
    "logit_scale": (None, 1), "use_swa": (None, False), "swa_window_size": (None,),
    "attention_sink_bias": (None, False), "add_swa_attention_sink_bias": (None, False),
    "is_neox_style": (None, True), "use_aux_hidden_state": (None, True), "causal_head": (None, False),
    "attention_mode": (None, "gqa"),
}  # fmt: skip
_CAUSAL = ("is_causal", "causal")  # of all layers; without them, of the layers with a window
_SLOTS = ("sample_from_anchor", "shift_label")
_NESTED = {"block_size", "mask_token_id", "mask_token", "target_layer_ids", "projector_type", *_CAUSAL, *_SLOTS,
           *_NEUTRAL, *(name for names in _HEADS.values() for name in names)}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_NUM_ANCHORS = 512  # a setting of training, without which DeepSpec's class does not load


def read_drafter_config(directory: Path) -> tuple[str, DrafterConfig, dict[str, Any]]:
    """Reads the config.json of a drafter.

    Returns:
      the layout ("dflash", "dspark", "dflash2"), the architecture, and the file's settings in z-lab's spelling.

    Raises:
      CheckpointError: it is missing or damaged, is of something else, contradicts itself, or has a setting that this
        library does not implement.
    """
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has neither drafter.json, as the workdir of a drafter's run, nor "
                              "config.json, as a drafter that was exported")
    try:
        settings = _settings(read_json(directory / "config.json"))
        return settings["layout"], _drafter_config(settings), settings
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{directory} is not a drafter that can be used: {error}") from error


def layout_of(config: DrafterConfig) -> str:
    """Returns the one layout that has a drafter's heads and slots.

    Raises:
      CheckpointError: none has them.
    """
    of_dspark = config.markov_rank > 0 or config.confidence_head
    of_dflash2 = (config.conv_kernel_size > 0, config.selector_rank > 0)
    if config.sample_from_anchor and not any(of_dflash2):
        return "dspark"
    if not config.sample_from_anchor and not of_dspark and all(of_dflash2):
        return "dflash2"
    if not config.sample_from_anchor and not of_dspark and not any(of_dflash2):
        return "dflash"
    raise CheckpointError("no layout has this drafter's parts together: dspark has sample_from_anchor, with heads of "
                          "Markov and confidence; dflash2 has convolutions and a selector; dflash has none of them")


def drafter_to_hf(config: DrafterConfig, target: ModelConfig, special_tokens: Mapping[str, int | None],
                  dtype: str) -> dict[str, Any]:
    """Returns the config.json of a drafter, with what engines read from several places in all of them.

    Args:
      target: the architecture of the drafter's target.
      special_tokens: the target's, as "eos_token_id".
      dtype: of the stored weights.

    Raises:
      CheckpointError: no layout can express this drafter.
    """
    if config.layers.family != "qwen3":
        raise CheckpointError(f"engines load drafters with the layers of qwen3, and this one has those of "
                              f"{config.layers.family}; train it with drafter.init=random")
    config, layout = canonical(config), layout_of(config)
    layers, sliding = config.layers, config.sliding_layers
    own = {"block_size": config.block_size, "mask_token_id": config.mask_token_id,
           "target_layer_ids": list(config.target_layer_ids)}
    heads = {}
    if layout == "dspark":
        heads = {"markov_rank": config.markov_rank, "markov_head_type": config.markov_head,
                 "enable_confidence_head": config.confidence_head, "num_anchors": _NUM_ANCHORS,
                 "confidence_head_with_markov": config.confidence_with_markov and config.markov_rank > 0}
    elif layout == "dflash2":
        own |= {name: getattr(config, name) for name in _HEADS["dflash2"]}
    if (config.causal, config.sliding_causal) != (False, True):
        heads["is_causal"] = config.sliding_causal if len(sliding) == layers.num_layers else config.causal
    hf = config_to_hf(dataclasses.replace(layers, sliding_window=None), {}, DiffusionSpec(None), dtype)
    rope = {"rope_type": "default"} if hf["rope_scaling"] is None else hf["rope_scaling"]
    hf |= own | heads | {name: value for name, value in special_tokens.items() if value is not None} | {
        "architectures": [ARCHITECTURES[layout]],
        "dtype": dtype,
        "rope_parameters": {"rope_theta": layers.rope_theta, **rope},
        "layer_types": [_SLIDING if layer in sliding else _FULL for layer in range(layers.num_layers)],
        "use_sliding_window": bool(sliding),
        "sliding_window": layers.sliding_window,
        "num_target_layers": target.num_layers,
        "dflash_config": own | ({"causal": heads["is_causal"]} if "is_causal" in heads else {}),
    }
    read_back = dataclasses.asdict(_drafter_config(_settings(hf)))
    if lost := [name for name, value in dataclasses.asdict(config).items() if read_back[name] != value]:
        raise CheckpointError(f"the layout {layout} cannot express this drafter's {', '.join(lost)}")
    return hf


def canonical(config: DrafterConfig) -> DrafterConfig:
    """Returns the drafter with the defaults for everything that does not change what it computes."""
    unused = {"sliding_causal": not config.sliding_layers,
              "causal": len(config.sliding_layers) == config.layers.num_layers,
              "markov_head": not config.markov_rank,
              "confidence_with_markov": not (config.confidence_head and config.markov_rank),
              "selector_top_k": not config.selector_rank, "conv_group_size": not config.conv_kernel_size}
    defaults = {field.name: field.default for field in dataclasses.fields(DrafterConfig) if unused.get(field.name)}
    layers = dataclasses.replace(config.layers, tie_embeddings=False, embed_dropout=0.0,
                                 attention_dropout=0.0, residual_dropout=0.0,
                                 sliding_window=config.layers.sliding_window if config.sliding_layers else None)
    return dataclasses.replace(config, layers=layers, **defaults)


def _settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a config.json in one place, with the key "layout"."""
    if "speculators_model_type" in hf:
        hf = _from_speculators(hf)
    nested = require(hf.get("dflash_config") or {}, "dflash_config", "an object")
    if unknown := sorted(nested.keys() - _NESTED):
        raise CheckpointError(f"config.json sets {', '.join(unknown)} in dflash_config, which this library does not "
                              "implement")
    for name in sorted(nested.keys() & hf.keys()):
        if nested[name] != hf[name]:
            raise CheckpointError(f"config.json gives {name} as {hf[name]!r}, and in dflash_config as "
                                  f"{nested[name]!r}; make them equal")
    settings = {name: value for name, value in {**hf, **nested}.items() if name != "dflash_config"}
    architecture = (hf.get("architectures") or [None])[0]
    layouts = {name: layout for layout, name in ARCHITECTURES.items()}
    if architecture not in layouts:
        raise CheckpointError(f"config.json names the architecture {architecture!r}, and drafters are of "
                              f"{', '.join(layouts)}")
    settings["layout"] = layout = layouts[architecture]
    check_implemented(settings, _NEUTRAL)
    if settings.get("projector_type") not in (None, layout):
        raise CheckpointError(f"config.json sets projector_type to {settings['projector_type']!r}, and the "
                              f"architecture is {architecture}; use the one that belongs to it")
    for name in ("hidden_size", "vocab_size"):
        other = name.replace("hidden", "target_hidden").replace("vocab", "draft_vocab")
        if settings.get(other) not in (None, settings.get(name)):
            raise CheckpointError(f"config.json gives {other} {settings[other]} beside {name} {settings.get(name)}, "
                                  "and this library needs them equal")
    if stray := [name for other, names in _HEADS.items() if other != layout for name in names if settings.get(name)]:
        raise CheckpointError(f"config.json sets {', '.join(stray)}, which {architecture} does not have")
    return settings


def _from_speculators(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json of speculators in z-lab's or DeepSpec's spelling."""
    layout, layers = hf["speculators_model_type"], hf.get("transformer_layer_config")
    if layout not in ("dflash", "dspark") or not isinstance(layers, dict):
        raise CheckpointError(f"config.json has speculators_model_type {layout!r}; this library reads dflash and "
                              "dspark, with transformer_layer_config")
    if layout == "dspark" and "sample_from_anchor" not in hf:
        raise CheckpointError("config.json does not say what the slots predict, as versions of speculators differ in "
                              "it; set sample_from_anchor, true as in DeepSpec, or false")
    inputs = require(hf.get("aux_hidden_state_layer_ids"), "aux_hidden_state_layer_ids", "a list of layers")
    same = ("block_size", "mask_token_id", "draft_vocab_size", "target_hidden_size", *_HEADS["dspark"])
    renamed = {name: hf[name] for name in same if name in hf}
    return layers | renamed | {
        "architectures": [ARCHITECTURES[layout]],
        "target_layer_ids": [layer - 1 for layer in inputs],
        "sample_from_anchor": hf.get("sample_from_anchor", False),
        "sliding_causal": not hf.get("sliding_window_non_causal", False),
        "speculators": True,
    }


def _drafter_config(settings: Mapping[str, Any]) -> DrafterConfig:
    layout, is_speculators = settings["layout"], settings.get("speculators", False)
    sample_from_anchor = settings["sample_from_anchor"] if is_speculators else layout == "dspark"
    for name in _SLOTS:
        if settings.get(name) not in (None, sample_from_anchor):
            raise CheckpointError(f"config.json sets {name} to {settings[name]}, and the slots of "
                                  f"{ARCHITECTURES[layout]} are the others; use the architecture that belongs to them")
    layers, sliding = _layers(settings)
    given = {name: settings[name] for name in _CAUSAL if settings.get(name) is not None}
    if len(set(given.values())) > 1:
        raise CheckpointError(f"config.json contradicts itself: {', '.join(f'{k} is {v}' for k, v in given.items())}")
    causal, sliding_causal = False, settings.get("sliding_causal", True)
    if given:
        causal = sliding_causal = next(iter(given.values()))
    mask, eos = _integer(settings, "mask_token_id"), settings.get("eos_token_id")
    if mask in (eos if isinstance(eos, list) else [eos]):
        raise CheckpointError(f"config.json gives mask_token_id and eos_token_id as {mask}, but a drafter must not "
                              "take the end of a text for a mask; train it with another token as its mask")
    heads: dict[str, Any] = {}
    if layout == "dspark":
        heads = {"markov_rank": _integer(settings, "markov_rank"),
                 "markov_head": settings.get("markov_head_type", "vanilla"),
                 "confidence_head": bool(settings.get("enable_confidence_head", False)),
                 "confidence_with_markov": settings.get("confidence_head_with_markov", True)}
    elif layout == "dflash2":
        heads = {name: _integer(settings, name) for name in _HEADS["dflash2"]}
    return canonical(DrafterConfig(
        layers, target_layer_ids=_target_layer_ids(settings, layers), block_size=_integer(settings, "block_size"),
        mask_token_id=mask, sample_from_anchor=sample_from_anchor, causal=causal, sliding_layers=sliding,
        sliding_causal=sliding_causal, **heads))


def _layers(settings: Mapping[str, Any]) -> tuple[ModelConfig, tuple[int, ...]]:
    """Returns the architecture of the layers, and which of them have the window."""
    if settings.get("model_type") != "qwen3":
        raise CheckpointError(f"config.json has model_type {settings.get('model_type')!r}, and the layers of drafters "
                              "are those of qwen3")
    bases = {rope["rope_theta"] for rope in (settings, settings.get("rope_parameters") or {},
                                             settings.get("rope_scaling") or {}) if "rope_theta" in rope}
    if len(bases) != 1:
        found = " and ".join(map(str, sorted(bases))) or "none"
        raise CheckpointError(f"config.json must give one rope_theta, as engines differ in its default and its place; "
                              f"it gives {found}")
    # A window has no default here; drafters have no embedding that could be tied.
    layers = config_from_hf({"sliding_window": None} | settings | {"tie_word_embeddings": False})
    return dataclasses.replace(layers, full_attention_layers=()), layers.sliding_layers


def _target_layer_ids(settings: Mapping[str, Any], layers: ModelConfig) -> tuple[int, ...]:
    ids = settings.get("target_layer_ids")
    if ids is None and settings["layout"] != "dspark":  # z-lab's code takes as many as the drafter has layers
        return spread_layer_ids(_integer(settings, "num_target_layers"), layers.num_layers)
    return tuple(require(ids, "target_layer_ids", "a list of layers"))


def _integer(settings: Mapping[str, Any], name: str) -> int:
    return require(settings.get(name), name, "an integer")
