import numpy as np
import pytest

from dlm_jax.checkpoints import hf_names
from dlm_jax.checkpoints.hf_names import Key

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(("key", "shape", "stored"), [
    (Key("w"), (3, 4), (3, 4)),
    (Key("w", "df->fd"), (3, 4), (4, 3)),
    (Key("w", "dhk->(hk)d"), (3, 4, 5), (20, 3)),
    (Key("w", "hkd->d(hk)"), (4, 5, 3), (3, 20)),
    (Key("w", "dhk->d(hk)", 1), (3, 4, 5), (3, 60)),
    (Key("w", "hk->(hk)", 2), (4, 5), (60,)),
])
def test_to_hf_inverts_from_hf_which_is_a_view(key, shape, stored):
    assert hf_names.hf_shape(key, shape) == stored
    tensor = RANDOM.normal(size=stored)
    param = hf_names.from_hf(tensor, key, shape)
    assert param.shape == shape and np.shares_memory(param, tensor)
    width = stored[-1] // 3
    part = tensor if key.third is None else tensor[..., key.third * width : (key.third + 1) * width]
    np.testing.assert_array_equal(hf_names.to_hf(param, key), part)


def test_heads_become_rows():
    weight = RANDOM.normal(size=(20, 3))  # torch: [out, in], heads of 5 rows
    kernel = hf_names.from_hf(weight, Key("w", "dhk->(hk)d"), (3, 4, 5))
    np.testing.assert_array_equal(kernel[:, 2], weight[10:15].T)


@pytest.mark.parametrize(("stored", "expected"), [
    ("transformer.h.0.ln_1.weight", "transformer.h.0.ln_1.weight"),
    ("h.0.ln_1.weight", "transformer.h.0.ln_1.weight"),
    ("denoise_model.h.0.ln_1.weight", "transformer.h.0.ln_1.weight"),
    ("embed_tokens.weight", "transformer.wte.weight"),
    ("lm_head.weight", "lm_head.weight"),
])
def test_canonical_names_of_three_layouts(stored, expected):
    assert hf_names.canonical([stored], "gpt2") == {expected: stored}


def test_buffers_are_omitted():
    names = ["h.0.attn.bias", "h.0.attn.masked_bias", "h.0.attn.c_attn.bias", "layers.0.self_attn.rotary_emb.inv_freq"]
    assert list(hf_names.canonical(names, "gpt2").values()) == ["h.0.attn.c_attn.bias"]


def test_diffugpt_names_round_trip():
    for key in hf_names.KEYS["gpt2"].values():
        name = key.name.format(i=3)
        assert name in hf_names.canonical([hf_names.diffugpt_name(name, "gpt2"), "denoise_model.wpe.weight"], "gpt2")
