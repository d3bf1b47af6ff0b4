"""Checkpoints as the DiffuGPT release stores them."""

import numpy as np
import pytest

from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints import load_pretrained
from tests.checkpoints import families


def as_release(directory, keep):
    """Turns an HF checkpoint into the DiffuGPT release's layout."""

    def rename(state):
        for name in list(state):
            state["denoise_model." + name.removeprefix("transformer.")] = state.pop(name)
        embedding = state.pop("denoise_model.wte.weight")
        state |= {name: embedding.clone() for name in keep}

    families.rewrite(directory, rename)


@pytest.mark.parametrize("keep", [
    ("embed_tokens.weight",), ("lm_head.weight",), ("embed_tokens.weight", "lm_head.weight")])
def test_the_released_layout(tmp_path, keep):
    model = families.save("gpt2", tmp_path)
    as_release(tmp_path, keep)
    families.set_config(tmp_path, vocab_size=96)  # the release resizes its vocabulary, and leaves config.json as it was
    loaded = load_pretrained(tmp_path, mask_token=96)
    assert loaded.model.config.tie_embeddings and loaded.model.config.vocab_size == 97
    tokens = families.tokens()
    logits = loaded.model(tokens, AttentionMask.causal())
    np.testing.assert_allclose(logits, families.torch_logits(model, tokens), atol=1e-4)


@pytest.mark.parametrize(("vocab_size", "mask_token_id"), [(50257, 10541), (50258, 50257), (50000, None)])
def test_the_released_mask_ids(tmp_path, vocab_size, mask_token_id):
    model = families.make("gpt2")
    model.resize_token_embeddings(vocab_size)
    model.save_pretrained(tmp_path)
    families.set_config(tmp_path, vocab_size=50257)
    as_release(tmp_path, ("embed_tokens.weight",))
    assert load_pretrained(tmp_path).mask_token_id == mask_token_id
