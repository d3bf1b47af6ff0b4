"""The configuration class of SDAR for `transformers`, which does not have one. It goes with an export.

Inference engines read `rope_theta` and `rope_scaling` as attributes, which classes of transformers 5 do not keep.
"""

from transformers import PretrainedConfig


class SDARConfig(PretrainedConfig):
    """The settings of Qwen3, with the tokens per block and the mask token."""

    model_type = "sdar"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                 num_attention_heads=16, num_key_value_heads=8, head_dim=128, hidden_act="silu",
                 max_position_embeddings=32768, initializer_range=0.02, rms_norm_eps=1e-6, use_cache=True,
                 rope_theta=1000000.0, rope_scaling=None, attention_bias=False, attention_dropout=0.0,
                 use_sliding_window=False, sliding_window=None, max_window_layers=28, block_size=4,
                 mask_token_id=151669, tie_word_embeddings=False, **others):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads, self.head_dim, self.hidden_act = num_key_value_heads, head_dim, hidden_act
        self.max_position_embeddings, self.initializer_range = max_position_embeddings, initializer_range
        self.rms_norm_eps, self.use_cache = rms_norm_eps, use_cache
        self.attention_bias, self.attention_dropout = attention_bias, attention_dropout
        self.use_sliding_window, self.sliding_window = use_sliding_window, sliding_window
        self.max_window_layers, self.block_size, self.mask_token_id = max_window_layers, block_size, mask_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling


class SDARMoeConfig(SDARConfig):
    """Those settings and the ones of Qwen3-MoE's experts, which are kept as they are."""

    model_type = "sdar_moe"
