"""Layouts that inference engines load: SDAR's for SGLang, LMDeploy and JetEngine, and Dream's for llama.cpp.

Both are the layout of transformers under another name. An engine computes what that name says, whatever config.json
says beside it: a model that was trained to do anything else is refused, with the reason.
"""

from typing import TYPE_CHECKING, Any

from dlm_jax.checkpoints.hf_config_diffusion import DIFFUSION_FAMILIES
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import CheckpointError

if TYPE_CHECKING:
    from dlm_jax.checkpoints.pretrained import Pretrained

# The model_type that each has for each family of networks.
ENGINE_LAYOUTS = {"sdar": {"qwen3": "sdar", "qwen3_moe": "sdar_moe"}, "dream": {"qwen2": "Dream"}}
SDAR_MASK_TOKEN_ID = 151669
SDAR_THRESHOLD = 0.9  # of a revealed token's probability, as the library's own default

_SDAR_CLASSES = {"sdar": "configuration_sdar.SDARConfig", "sdar_moe": "configuration_sdar.SDARMoeConfig"}


def engine_config(pretrained: "Pretrained", hf: dict[str, Any], layout: str) -> dict[str, Any]:
    """Returns an engine's config.json from that of transformers; the head is written although it may be tied.

    Raises:
      CheckpointError: an engine would serve another model than this one.
    """
    problems = _network_problems(pretrained, layout) | (
        _sdar_problems if layout == "sdar" else _dream_problems)(pretrained.diffusion)
    if found := [problem for problem, is_one in problems.items() if is_one]:
        raise CheckpointError(f"the layout {layout} cannot hold {pretrained.source}: {'; '.join(found)}")
    model_type = ENGINE_LAYOUTS[layout][pretrained.model.config.family]
    changed = {"model_type": model_type, "architectures": [DIFFUSION_FAMILIES[model_type].architecture],
               "tie_word_embeddings": False}
    if layout == "sdar":
        changed |= {"auto_map": {"AutoConfig": _SDAR_CLASSES[model_type]},
                    "block_size": pretrained.diffusion.blocks.size,
                    "fuse_cross_entropy": False}  # which SDAR's own modeling code reads
    return hf | changed


def sglang_config(pretrained: "Pretrained") -> str:
    """Returns the file for SGLang's --dllm-algorithm-config, which takes nothing of this from config.json."""
    return f"block_size: {pretrained.diffusion.blocks.size}\nthreshold: {SDAR_THRESHOLD}\n"


def _sdar_problems(diffusion: DiffusionSpec) -> dict[str, bool]:
    blocks = diffusion.blocks
    return {
        "engines take the id of its mask token for granted, which is "
        f"{SDAR_MASK_TOKEN_ID}, and this model's is {diffusion.mask_token_id} (a new mask token of Qwen3 gets that "
        "id)": diffusion.mask_token_id != SDAR_MASK_TOKEN_ID,
        "engines read a token from its own position, and this model predicts the next one; train it with "
        "objective.shift=false": diffusion.shift,
        "engines fill one block after another, and this model sees entire rows; train it with "
        "objective.name=block_diffusion": blocks is None,
        "engines let a finished block see all of itself; train it with objective.clean_attention=block_bidirectional":
            blocks is not None and blocks.clean_attention != "block_bidirectional",
    }


def _dream_problems(diffusion: DiffusionSpec) -> dict[str, bool]:
    return {
        "it has no mask token; name one": diffusion.mask_token_id is None,
        "engines read a token from the position before it, and this model was trained without the shift":
            not diffusion.shift,
        "engines let every position see every other, and this model writes in blocks": diffusion.blocks is not None,
    }


def _network_problems(pretrained: "Pretrained", layout: str) -> dict[str, bool]:
    config, families = pretrained.model.config, ENGINE_LAYOUTS[layout]
    return {
        f"its network is that of {' or '.join(families)}, and this model is a {config.family}":
            config.family not in families,
        f"engines have no sliding window, and this model's is {config.sliding_window}":
            config.sliding_window is not None,
        f"engines have the activation silu, and this model has {config.activation}": config.activation != "silu",
        "engines need its tokenizer, and there is none": pretrained.tokenizer is None,
    }
