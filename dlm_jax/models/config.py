"""The architecture (ModelConfig), and how it is computed (Compute)."""

import dataclasses
from typing import Literal

from dlm_jax.attention import Partition
from dlm_jax.config_fields import check_at_least, check_choices, check_range
from dlm_jax.errors import ConfigError
from dlm_jax.matmul import MatmulKind


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length of the original training.

    `linear` divides every frequency by `factor`. `llama3` divides those of wavelengths above
    `original_max_length / low_freq_factor`, keeps those below `original_max_length / high_freq_factor`, and
    interpolates between (Llama 3.1). `yarn` divides those that turn fewer than `beta_slow` times in
    `original_max_length`, keeps those that turn more than `beta_fast` times, interpolates between over channels, whose
    bounds are integers with `truncate`, and multiplies cosine and sine by `attention_factor` (arXiv 2309.00071).
    `dynamic` changes nothing in rows of up to the model's length, and longer ones are refused: it would stretch each
    row by its own length.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """The experts of each layer, in HF's names.

    Attributes:
      norm_topk_prob: the weights of a token's experts add up to 1.
      router_aux_loss_coef: of the load-balancing loss in training.
    """

    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        check_range(self.num_experts_per_tok, 1, self.num_experts, "num_experts_per_tok")
        check_at_least(self.router_aux_loss_coef, 0, "router_aux_loss_coef")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of one decoder that covers GPT-2, LLaMA, Mistral, Qwen2, Qwen3, Gemma 2 and Gemma 3.

    Attributes:
      norm: LayerNorm, RMSNorm, or RMSNorm that multiplies by 1 + its weight.
      post_norms: the outputs of attention and MLP are normed too, before they are added to the residual stream.
      mlp_size: of the MLP, or of each expert.
      experts: a mixture of experts takes the place of the MLP.
      gated_mlp: act(gate(x)) * up(x) instead of act(up(x)).
      partial_rotary_factor: the share of each head's channels, the first ones, that RoPE rotates.
      scale_embeddings: embeddings of tokens are multiplied by the square root of the width.
      sliding_window: keys this many positions away or farther are not seen.
      full_attention_layers: layers, from 0 on, that see them nevertheless.
      sliding_rope_theta: base of RoPE, without scaling, in the other layers; None: RoPE is the same in all layers.
      query_pre_attn_scalar: scores are divided by its square root; None: by that of `head_dim`.
      attention_softcap, logit_softcap: of attention's scores and of the logits; see `attention.soft_cap`.
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
    norm: Literal["layer", "rms", "zero_centered_rms"] = "rms"
    norm_eps: float = 1e-5
    post_norms: bool = False
    activation: Literal["gelu_tanh", "gelu", "silu", "relu"] = "silu"
    gated_mlp: bool = True
    experts: ExpertsConfig | None = None
    positions: Literal["learned", "rope"] = "rope"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    scale_embeddings: bool = False
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    sliding_rope_theta: float | None = None
    query_pre_attn_scalar: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.full_attention_layers and self.sliding_window is None:
            raise ConfigError("full_attention_layers are an exception to sliding_window, which is not set")
        check_choices(self)

    @property
    def sliding_layers(self) -> tuple[int, ...]:
        """The layers that see no more than the sliding window."""
        layers = () if self.sliding_window is None else range(self.num_layers)
        return tuple(layer for layer in layers if layer not in self.full_attention_layers)


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the network is computed; changes speed, memory and rounding, never the mathematics.

    Attributes:
      dtype: of activations and matrix products. Parameters keep their own dtype; logits, softmax, norms and rotary
        angles are always float32.
      remat: what the backward pass recomputes: "none", "dots" (saves products with parameters), "full" (saves the
        inputs of layers) or "offload" (saves those in host memory).
      attention: an attention backend, or "auto".
      matmul: how matrices are multiplied: "default", or "cpu_bfloat16" (see `dlm_jax.matmul`).
      partition: the mesh axes that split activations, for backends that XLA cannot split by itself.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full", "offload"] = "none"
    attention: str = "auto"
    partition: Partition | None = None
    matmul: MatmulKind = "default"

    def __post_init__(self) -> None:
        check_choices(self, "model")
