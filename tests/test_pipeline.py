import dataclasses
import json
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

import dlm_jax
from dlm_jax import AttentionMask, DiffusionLM, DLMError
from dlm_jax.checkpoints import load_pretrained
from dlm_jax.checkpoints.hf_import import aligned_empty
from dlm_jax.diffusion import BlockSpec
from dlm_jax.evaluation import bound
from tests.sampling.tiny_models import byte_tokenizer

STEPS = {"num_steps": 5}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Saves a GPT-2 with random weights in HF layout and a token per byte; returns its directory."""
    directory = tmp_path_factory.mktemp("base")
    byte_tokenizer().save_pretrained(directory)
    config = {"model_type": "gpt2", "vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 96,
              "bos_token_id": 256, "eos_token_id": 256, "initializer_range": 0.4}
    (directory / "config.json").write_text(json.dumps(config))
    DiffusionLM(load_pretrained(directory, init="random")).save_pretrained(directory / "weights")
    return directory / "weights"


@pytest.fixture(scope="module")
def lm(base):
    return DiffusionLM.from_pretrained(base, mask_token="<mask>")


def test_import_does_not_load_jax():
    code = "import sys, dlm_jax; print('jax' in sys.modules, dlm_jax.__version__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", dlm_jax.__version__]
    for name in dlm_jax.__all__:
        assert getattr(dlm_jax, name) is not None
    with pytest.raises(AttributeError, match="Missing"):
        dlm_jax.Missing  # noqa: B018


def test_default_policy(lm):
    blocks = dataclasses.replace(lm.diffusion, blocks=BlockSpec(4))
    with_blocks = dataclasses.replace(lm, pretrained=dataclasses.replace(lm.pretrained, diffusion=blocks))
    parent = dataclasses.replace(lm, pretrained=dataclasses.replace(lm.pretrained,
                                                                    recipe={"objective.name": "autoregressive"}))
    for model, policy in ((lm, "confidence"), (with_blocks, "threshold"), (parent, "autoregressive")):
        assert model.default_policy == policy
        assert model.generate("ab", max_new_tokens=6) == model.generate("ab", max_new_tokens=6, policy=policy)


def test_logits_attention(lm):
    tokens = np.random.default_rng(0).integers(0, 257, (2, 7))
    expected = lm.model(jnp.asarray(tokens), AttentionMask.bidirectional())
    np.testing.assert_allclose(lm.logits(tokens), expected, atol=1e-5)
    causal = lm.logits(tokens, AttentionMask.causal())
    assert causal.shape == (2, 7, 258)
    assert causal.dtype == jnp.float32
    assert np.abs(causal - lm.logits(tokens)).max() > 0.1
    matrix = AttentionMask.matrix(np.tril(np.ones((7, 7), bool)))
    np.testing.assert_allclose(lm.logits(tokens, matrix), causal, atol=1e-5)


def test_tokens_may_change_after_the_call(lm):
    """JAX may use an aligned array without a copy, and computes asynchronously."""
    expected = np.asarray(lm.logits(np.zeros((4, 32), np.int32)))
    for _ in range(20):
        tokens = aligned_empty((4, 32), np.int32)
        tokens[:] = 0
        found = lm.logits(tokens)
        tokens[:] = 1
        np.testing.assert_array_equal(found, expected)


def test_text_depends_on_prompt_index_and_seed_alone(lm):
    prompts = ["Once", "", "a much longer prompt, of another bucket", "Zoë 🏠", ""]
    options = {"max_new_tokens": 9, "policy": "random", "top_p": 0.9, **STEPS}
    texts = lm.generate(prompts, **options)
    assert all(text.startswith(prompt) for prompt, text in zip(prompts, texts, strict=True))
    assert lm.generate(prompts, batch_size=2, **options) == texts
    for i in (0, 1, 3):
        assert lm.generate(prompts[i], example_index=[i], **options) == [texts[i]]
    assert texts[1] != texts[4]  # two samples of one prompt
    assert lm.generate(prompts, seed=1, **options) != texts


def test_generate_stops_at_eos_and_infill_does_not(lm):
    filled = lm.infill("ab<mask:20>", **STEPS)[0]
    text = lm.generate("ab", max_new_tokens=20, **STEPS)[0]
    assert filled.startswith(text)
    assert 2 < len(text) <= 22


def test_infill_keeps_text_around_gaps(lm):
    texts = ["  The cat<mask:4>\r\n sat — <mask> on ", "<mask:3> end"]
    first, second = lm.infill(texts, gap_length=2, **STEPS)
    assert first.startswith("  The cat")
    assert first.endswith(" on ")
    assert "\r\n sat — " in first
    assert second.endswith(" end")
    assert lm.infill(texts[::-1], gap_length=2, example_index=[1, 0], **STEPS) == [second, first]


def fine_tuned(lm, **settings):
    """Returns the model with the recipe of a run on such examples."""
    recipe = {f"data.examples.{name}": value for name, value in settings.items()}
    return DiffusionLM(dataclasses.replace(lm.pretrained, recipe=recipe))


def test_respond_uses_prompt_format_of_the_run(lm):
    tuned = fine_tuned(lm, format="prompt_response", separator="\n=")
    questions = ["What is it?", "Why?"]
    options = {"max_new_tokens": 9, "policy": "random", **STEPS}
    asked = [question + "\n=" for question in questions]
    written = [text.removeprefix(prompt).strip() for text, prompt in
               zip(lm.generate(asked, **options), asked, strict=True)]
    assert tuned.respond(questions, **options) == written and all(written)
    assert tuned.respond(questions[1], example_index=[1], **options) == written[1:]
    given = tuned.prompt_format(separator="?")
    assert tuned.respond("Why", prompt_format=given, **options) == [
        lm.generate("Why?", **options)[0].removeprefix("Why?").strip()]


def test_respond_to_conversation_stops_at_any_end_token(lm, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}")
    prompt_format = lm.prompt_format(chat_template=str(file))
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "?"}]
    options = {"max_new_tokens": 24, "policy": "autoregressive", "prompt_format": prompt_format}
    answer = lm.respond(talk, **options)
    assert answer == lm.respond([talk], **options) == [
        lm.generate("uHi;aHo;u?;", max_new_tokens=24, policy="autoregressive")[0].removeprefix("uHi;aHo;u?;").strip()]
    (prompt, length), seen = (prompt_format.encode_prompt(talk), 24), []
    lm.respond(talk, on_step=seen.append, **options)
    tokens = seen[-1].tokens[0, len(prompt) : len(prompt) + length].tolist()
    end = tokens[10]
    stub = types.SimpleNamespace(encode_prompt=prompt_format.encode_prompt, end_token_ids=(end, 256),
                                 decode_response=list)
    assert lm.respond(talk, **options | {"prompt_format": stub}) == [tokens[: tokens.index(end)]]
    with pytest.raises(DLMError, match="prompt format"):
        lm.respond("Hi")


def test_score_is_the_bound(lm):
    texts = ["a story", "a rather longer story than that, in another bucket"]
    scores = lm.score(texts, num_samples=16)
    assert [score.num_tokens for score in scores] == [len(text) for text in texts]
    row = np.array([[256, *lm.tokenizer(texts[0])["input_ids"]]])
    alone = bound(lm.model, row, np.ones_like(row, bool), diffusion=lm.diffusion, num_samples=16)
    assert scores[0].nats == pytest.approx(alone.nats, rel=1e-4)
    assert scores[0].nats_per_token == pytest.approx(alone.nats / len(texts[0]), rel=1e-4)
    assert 0 < scores[0].standard_error < scores[0].nats_per_token
    assert lm.score(texts, num_samples=16, batch_size=3)[1].nats == pytest.approx(scores[1].nats, rel=1e-4)


def test_saved_model_records_mask_token_and_generates_the_same(lm, tmp_path):
    lm.save_pretrained(tmp_path / "saved")
    again = DiffusionLM.from_pretrained(tmp_path / "saved")
    assert again.mask_token_id == lm.mask_token_id == 257
    assert again.generate("ab", max_new_tokens=8, **STEPS) == lm.generate("ab", max_new_tokens=8, **STEPS)


def test_bfloat16(base):
    lm = DiffusionLM.from_pretrained(base, mask_token="<mask>", dtype="bfloat16")
    assert lm.model.final_norm.scale[...].dtype == jnp.bfloat16
    assert lm.logits(np.zeros((1, 4), int)).dtype == jnp.float32
    assert lm.generate("ab", max_new_tokens=4, **STEPS)[0].startswith("ab")


@pytest.mark.parametrize(("call", "match"), [
    (lambda lm: lm.generate([]), "prompts"),
    (lambda lm: lm.generate("a" * 96, max_new_tokens=4), "text 0 .*101.*96"),
    (lambda lm: lm.generate("a", max_new_tokens=0), "max_new_tokens"),
    (lambda lm: lm.respond("a", max_new_tokens=0), "max_new_tokens"),
    (lambda lm: fine_tuned(lm, format="gsm8k").respond([]), "questions"),
    (lambda lm: fine_tuned(lm, format="gsm8k").respond("a" * 90, max_new_tokens=20), "text 0 .*112"),
    (lambda lm: lm.generate("a", num_steps=0), "num_steps"),
    (lambda lm: lm.generate("a", policy="best"), "policy.*best"),
    (lambda lm: lm.generate("a", batch_size=0), "batch_size"),
    (lambda lm: lm.generate("a", example_index=[0, 1]), "example_index"),
    (lambda lm: lm.infill("nothing to fill"), "nothing to fill"),
    (lambda lm: lm.infill("a<mask:0>b"), "a<mask:0>b"),
    (lambda lm: lm.infill("a", top_q=1), "top_q"),
    (lambda lm: lm.infill("a<mask>b", gap_length=0), "a<mask>b"),
    (lambda lm: lm.score(["a", ""]), "text 1"),
    (lambda lm: lm.score("a", num_samples=1), "num_samples"),
    (lambda lm: lm.score("a", batch_size=0), "batch_size"),
    (lambda lm: lm.logits(np.zeros(4, int)), r"\[batch, length\]"),
    (lambda lm: lm.logits(np.zeros((1, 97), int)), "96"),
    (lambda lm: lm.logits(np.full((1, 4), 258)), r"0 \.\. 257"),
    (lambda lm: lm.save_pretrained("unused", layout="other"), "layout.*other"),
])
def test_refused_input(lm, call, match):
    with pytest.raises(DLMError, match=match) as error:
        call(lm)
    assert "\n" not in str(error.value)


def test_model_without_mask_token(base):
    lm = DiffusionLM.from_pretrained(base)
    assert lm.logits(np.zeros((1, 4), int)).shape == (1, 4, 257)
    with pytest.raises(DLMError, match="mask_token="):
        lm.generate("a", **STEPS)


def test_real_llama_infills(test_data):
    lm = DiffusionLM.from_pretrained(test_data / "stories260K_hf", mask_token="<mask_token>")
    text = lm.infill("Once upon a time, there was a <mask:2> girl named Lily.<mask:8>", num_steps=8, temperature=0.0)[0]
    assert text.startswith("Once upon a time, there was a ")
    assert " girl named Lily." in text
    assert lm.generate("One day,", max_new_tokens=12, num_steps=4)[0].startswith("One day,")
    assert 0 < lm.score("Once upon a time, there was a little girl.", num_samples=8)[0].nats_per_token < 20


def test_mesh_generates_the_same(base, lm):
    from dlm_jax.parallel import MeshConfig

    split = DiffusionLM.from_pretrained(base, mask_token="<mask>", mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    assert len(split.model.blocks.mlp.up.kernel.get_value().sharding.device_set) == 8
    prompts, seen = ["Once", "a longer prompt", ""], []
    texts = split.generate(prompts, max_new_tokens=9, on_step=seen.append, **STEPS)
    assert texts == lm.generate(prompts, max_new_tokens=9, **STEPS)
    assert sorted(seen[-1].rows) == [0, 1, 2]
    tokens = np.random.default_rng(0).integers(0, 257, (2, 7))
    np.testing.assert_allclose(split.logits(tokens), lm.logits(tokens), atol=1e-4)
    assert split.score("Once upon", num_samples=4)[0].nats == pytest.approx(
        lm.score("Once upon", num_samples=4)[0].nats, rel=1e-4)


def test_infill_gaps_of_unknown_length(lm):
    texts = ["ab<mask:2-5>cd", "x<mask:1-3>y<mask:2>z", "ends with <mask:2-3>"]
    filled = lm.infill(texts, **STEPS)
    assert filled[0].startswith("ab") and filled[0].endswith("cd")
    assert lm.infill(texts, batch_size=3, **STEPS) == filled
    assert lm.infill(texts[1], example_index=[1], **STEPS) == [filled[1]]
    with pytest.raises(DLMError, match="text 0"):
        lm.infill("ab<mask:2-200>cd", **STEPS)
    for bad in ("<mask:0-3>", "a<mask:5-2>b"):
        with pytest.raises(DLMError, match=bad):
            lm.infill(bad, **STEPS)
