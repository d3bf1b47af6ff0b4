"""Every family against its PyTorch model in transformers, and the goldens of the reference implementation."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.checkpoints.hf_names import KEYS, diffugpt_name, named_tensors
from dlm_jax.diffusion import HeadPlan, NoisyBatch, loss_sums, token_nll
from tests.checkpoints import families


def causal_loss(graphdef, params, tokens):
    logits = nnx.merge(graphdef, params)(tokens, AttentionMask.causal())
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).mean(), logits


@pytest.mark.parametrize("case", families.CASES)
def test_logits_gradients_and_round_trip(case, tmp_path):
    reference = families.save(case, tmp_path / "hf")
    tokens = families.tokens()
    loaded = load_pretrained(tmp_path / "hf")
    graphdef, params = nnx.split(loaded.model)
    compute = jax.jit(jax.value_and_grad(causal_loss, argnums=1, has_aux=True), static_argnums=0)
    (loss, logits), gradients = compute(graphdef, params, tokens)

    torch_tokens = torch.from_numpy(tokens).long()
    output = reference(torch_tokens, labels=torch_tokens)
    output.loss.backward()
    np.testing.assert_allclose(logits, output.logits.detach().numpy(), atol=1e-4, rtol=0)
    assert abs(float(loss) - output.loss.item()) < 1e-5

    expected = families.by_expert({name: parameter.grad for name, parameter in reference.named_parameters()})
    found = named_tensors(KEYS[loaded.model.config.family], gradients)
    assert found.keys() == expected.keys()
    for name, (_, gradient) in found.items():
        error = np.abs(gradient() - expected[name].numpy()).max() / np.abs(expected[name].numpy()).max()
        assert error < 1e-3, f"gradient of {name} is off by {error}"

    save_pretrained(tmp_path / "out", loaded)
    again = load_pretrained(tmp_path / "out")
    assert again.model.config == loaded.model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again.model), nnx.state(loaded.model))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(exported) is type(reference)
    np.testing.assert_array_equal(families.torch_logits(exported.eval(), tokens), output.logits.detach().numpy())


GOLDENS = {"gpt2_random": "reference_cases/gpt2_random", "llama_gqa_random": "reference_cases/llama_gqa_random",
         "stories260K": "stories260K_hf"}


@pytest.mark.parametrize("case", GOLDENS)
def test_reference_goldens(case, test_data):
    golden = np.load(test_data / "reference_cases" / f"{case}.npz")
    pretrained = load_pretrained(test_data / GOLDENS[case], mask_token=int(golden["mask_token_id"]))
    attention = AttentionMask.matrix(golden["allowed"])
    # The reference infers the loss mask from the tokens; position 0 drops out by the shift.
    loss_mask = jnp.asarray(golden["x_t"] == golden["mask_token_id"])
    batch = NoisyBatch(tokens=jnp.asarray(golden["x_t"]), targets=jnp.asarray(golden["x"]),
                       loss_mask=loss_mask, noisable_mask=loss_mask,
                       weights=jnp.broadcast_to(1 / golden["t"][:, None], loss_mask.shape))

    def loss(params):
        model = nnx.merge(graphdef, params)
        hidden = model.hidden(batch.tokens, attention)
        plan = HeadPlan(model.head_kernel.axes.index("vocab"), chunk_size=16)
        sums = loss_sums(hidden, model.head_kernel.get_value(), plan, batch, shift=True)
        per_token = token_nll(hidden, model.unembed, batch.targets, shift=True)
        return sums.loss / sums.normalizer("masked_tokens"), (model.unembed(hidden), per_token)

    graphdef, params = nnx.split(pretrained.model)
    (value, (logits, per_token)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(per_token[:, 1:], golden["cross_entropy"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(value, golden["reference_loss"], rtol=1e-5)

    expected = json.loads((test_data / "reference_cases" / f"{case}_grad_norms.json").read_text())
    family = pretrained.model.config.family
    found = {diffugpt_name(name, family): float(np.linalg.norm(gradient()))
             for name, (_, gradient) in named_tensors(KEYS[family], gradients).items()}
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def test_stories260k_continues_its_story(test_data):
    """Each token of llama2.c's greedy story is the most probable one after those before it."""
    directory = test_data / "stories260K_hf"
    story = re.search(r"-t 0\.0\n(.*?)\n```", (directory / "stories260K.md").read_text(), re.DOTALL)[1]
    pretrained = load_pretrained(directory)
    tokens = pretrained.tokenizer.encode(story)
    assert len(tokens) == 257
    np.testing.assert_array_equal(families.logits(pretrained.model, np.array([tokens[:-1]]))[0].argmax(-1), tokens[1:])
