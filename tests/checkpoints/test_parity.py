"""Every family against its PyTorch model in transformers: logits, gradients, and the way there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.checkpoints.hf_export import hf_tensors
from tests.checkpoints import families


def causal_loss(graphdef, params, tokens):
    logits = nnx.merge(graphdef, params)(tokens, AttentionMask.causal())
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).mean(), logits


@pytest.mark.parametrize("case", families.CASES)
def test_family_agrees_with_transformers_and_survives_the_round_trip(case, tmp_path):
    reference = families.save(case, tmp_path / "hf")
    tokens = families.tokens()
    ours = load_pretrained(tmp_path / "hf")
    graphdef, params = nnx.split(ours.model)
    compute = jax.jit(jax.value_and_grad(causal_loss, argnums=1, has_aux=True), static_argnums=0)
    (loss, logits), gradients = compute(graphdef, params, tokens)

    torch_tokens = torch.from_numpy(tokens).long()
    output = reference(torch_tokens, labels=torch_tokens)
    output.loss.backward()
    np.testing.assert_allclose(logits, output.logits.detach().numpy(), atol=1e-4, rtol=0)
    assert abs(float(loss) - output.loss.item()) < 1e-5

    expected = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    found = hf_tensors(nnx.merge(graphdef, gradients))
    assert found.keys() == expected.keys()
    for name, (_, gradient) in found.items():
        error = np.abs(gradient() - expected[name]).max() / np.abs(expected[name]).max()
        assert error < 1e-3, f"gradient of {name} is off by {error}"

    save_pretrained(tmp_path / "out", ours)
    again = load_pretrained(tmp_path / "out")
    assert again.model.config == ours.model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again.model), nnx.state(ours.model))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(exported) is type(reference)
    np.testing.assert_array_equal(families.torch_logits(exported.eval(), tokens), output.logits.detach().numpy())
