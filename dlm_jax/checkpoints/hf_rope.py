"""The rotary settings of a config.json, in the keys of transformers 4 or 5, to and from RopeScaling."""

import math
from collections.abc import Mapping
from typing import Any

from dlm_jax.checkpoints.settings import require
from dlm_jax.errors import CheckpointError
from dlm_jax.models import RopeScaling

_ORIGINAL = "original_max_position_embeddings"
# HF's keys that a kind of scaling must have, and the fields of RopeScaling that they are.
_REQUIRED = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
               _ORIGINAL: "original_max_length"},
    "yarn": {"factor": "factor", _ORIGINAL: "original_max_length"},
}  # fmt: skip
# Keys of YaRN that have defaults. Null counts as absent, and so does 0 for the two betas.
_YARN_OPTIONAL = ("beta_fast", "beta_slow", "attention_factor")
_YARN_ATTENTION = ("mscale", "mscale_all_dim")


def rope_from_hf(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Returns the base and scaling of RoPE, from the keys of transformers 4 or 5.

    Where both are there, transformers reads `rope_scaling` and nothing of `rope_parameters`, not even its base.

    Raises:
      CheckpointError: a kind of scaling that this library does not implement, or a setting that is missing, not a
        number, or given twice with different values.
    """
    scaling, parameters = (_rope_object(hf, name) for name in ("rope_scaling", "rope_parameters"))
    rope = scaling or parameters
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    other = parameters.get("rope_theta", theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(theta, "rope_theta", "a number")
    if scaling and other != theta:
        raise CheckpointError(f"config.json gives rope_theta {other} in rope_parameters, and rope_scaling, which "
                              f"replaces all of it and so makes it {theta}; write the scaling into rope_parameters")
    if kind == "default":
        return theta, None
    if kind not in _REQUIRED:
        raise CheckpointError(f"config.json asks for RoPE scaling of type {kind!r}; supported are "
                              f"{', '.join(_REQUIRED)}")
    required = _REQUIRED[kind]
    outer = hf.get(_ORIGINAL, hf.get("max_position_embeddings"))
    known = {_ORIGINAL: outer} | rope
    if _ORIGINAL in hf and _ORIGINAL in required and known[_ORIGINAL] != outer:
        raise CheckpointError(f"config.json gives {_ORIGINAL} as {outer}, and as {known[_ORIGINAL]} in its {kind} RoPE "
                              "scaling; remove the wrong one")
    fields = {field: require(known.get(name), f"{name} of its {kind} RoPE scaling", "a number")
              for name, field in required.items()}
    return theta, RopeScaling(kind, **fields, **(_yarn(rope) if kind == "yarn" else {}))


def partial_rotary_factor(hf: Mapping[str, Any]) -> float:
    """Returns the share of each head's channels that RoPE rotates, from the keys of transformers 4 or 5.

    Raises:
      CheckpointError: it is not a number above 0 and at most 1.
    """
    name = "partial_rotary_factor"
    rope = _rope_object(hf, "rope_scaling") or _rope_object(hf, "rope_parameters")
    value = rope.get(name, hf.get(name))
    value = 1.0 if value is None else value
    if require(value, name, "a positive number") > 1:
        raise CheckpointError(f"config.json must give {name} as a number of at most 1, not {value!r}")
    return float(value)


def rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Returns `rope_scaling` as transformers 4 and 5 read it; inverts `rope_from_hf`."""
    if scaling is None:
        return None
    required = _REQUIRED[scaling.kind]
    hf = {"rope_type": scaling.kind} | {name: getattr(scaling, field) for name, field in required.items()}
    if scaling.kind == "yarn":
        hf |= {name: getattr(scaling, name) for name in (*_YARN_OPTIONAL, "truncate")}
    return hf


def _yarn(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of YaRN that have defaults; its scale of attention as transformers infers it."""
    for name in (*_YARN_OPTIONAL, *_YARN_ATTENTION):
        if rope.get(name) is not None:
            require(rope[name], f"{name} of its yarn RoPE scaling", "a number")
    truncate = require(rope.get("truncate", True), "truncate of its yarn RoPE scaling", "true or false")
    scale = rope.get("attention_factor")
    if scale is None:
        above, below = (rope.get(name) for name in _YARN_ATTENTION)
        scale = (_yarn_scale(rope["factor"], above) / _yarn_scale(rope["factor"], below) if above and below
                 else _yarn_scale(rope["factor"], 1.0))
    return {"beta_fast": rope.get("beta_fast") or 32.0, "beta_slow": rope.get("beta_slow") or 1.0,
            "attention_factor": scale, "truncate": truncate}


def _yarn_scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _rope_object(hf: Mapping[str, Any], name: str) -> dict[str, Any]:
    rope = require(hf.get(name) or {}, name, "an object")
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise CheckpointError(f"config.json gives {name} of its own to each kind of layer ({', '.join(nested)}), "
                              "which this library does not implement")
    return rope
