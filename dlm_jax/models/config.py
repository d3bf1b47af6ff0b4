"""What the network is (ModelConfig) and how it is computed (Compute), kept apart."""

import dataclasses

from dlm_jax.attention import Partition
from dlm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for lengths beyond those of the original training.

    `linear` divides every frequency by `factor`. `llama3` does so for wavelengths longer than
    `original_max_length / low_freq_factor`, not at all below `original_max_length / high_freq_factor`,
    and interpolates between (Llama 3.1).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder stack that covers GPT-2, LLaMA, Mistral, Qwen2 and Qwen3.

    `norm`: "layer" or "rms". `positions`: "learned" or "rope". `activation`: "gelu_tanh", "gelu", "silu" or
    "relu". `gated_mlp`: act(gate(x)) * up(x) instead of act(up(x)). `sliding_window`: keys this far away or
    farther are not seen.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_length: int
    norm: str = "rms"
    norm_eps: float = 1e-5
    activation: str = "silu"
    gated_mlp: bool = True
    positions: str = "rope"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    sliding_window: int | None = None
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}")


_CHOICES = {
    "norm": ("layer", "rms"),
    "activation": ("gelu_tanh", "gelu", "silu", "relu"),
    "positions": ("learned", "rope"),
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the network is computed; changes speed, memory and rounding, never the mathematics.

    Attributes:
      dtype: type of activations and matrix products, "float32" or "bfloat16". Parameters keep their own type;
        logits, softmax, norms and rotary angles are float32 always.
      remat: what the backward pass recomputes: "none", "dots" (keep products with parameters), "full" (keep the inputs
        of layers) or "offload" (keep those in host memory).
      attention: an attention backend by name, or "auto".
      partition: the mesh axes that split activations, for backends that XLA cannot split by itself.
    """

    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    partition: Partition | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"compute dtype {self.dtype!r} is unknown; choose float32 or bfloat16")
        if self.remat not in ("none", "dots", "full", "offload"):
            raise ConfigError(f"remat policy {self.remat!r} is unknown; choose none, dots, full or offload")
