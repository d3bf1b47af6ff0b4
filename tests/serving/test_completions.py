"""Answers through OpenAI's client: texts equal to the library's, streams, steps, stop strings and log-probabilities."""

import numpy as np
import pytest

from dlm_jax.attention import AttentionMask
from dlm_jax.data.tokenization import tokenize
from dlm_jax.serving.jobs import ServedModel, plan_completion, warm_up_jobs
from dlm_jax.serving.protocol import CompletionRequest
from dlm_jax.serving.queue import Job
from tests.serving.conftest import STEPS

PROMPTS = ["Zoë", "a cat "]
POLICIES = [("full", STEPS), ("full", {"policy": "random_exact", "remask": 0.3, "block_length": 5, **STEPS}),
            ("blocks", {"threshold": 0.3}), ("causal", {}), ("causal", {"drafter": "ngram"})]


def library_settings(model: str, options: dict) -> dict:
    """The same settings for `DiffusionLM`, which has no default policy for a model without a mask token."""
    policy = {"causal": "autoregressive"}.get(model)
    policy = "autoregressive" if "drafter" in options else "threshold" if "threshold" in options else policy
    return {"policy": policy} | options


@pytest.mark.parametrize(("model", "options"), POLICIES)
def test_completions_equal_the_library(client, lms, model, options):
    """Choice p * n + j is sample j of prompt p; streamed, whole, and from `DiffusionLM` the text is the same."""
    expected = lms[model].generate([prompt for prompt in PROMPTS for _ in range(2)], max_new_tokens=12, seed=3,
                                   **library_settings(model, options))
    request = {"model": model, "prompt": PROMPTS, "n": 2, "max_tokens": 12, "seed": 3, "extra_body": options}
    answer = client.completions.create(**request)
    texts = [PROMPTS[choice.index // 2] + choice.text for choice in answer.choices]
    assert texts == expected and [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.seed == 3 and answer.usage.forward_passes > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    streamed, reasons, usage = [""] * 4, [None] * 4, None
    for chunk in client.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            streamed[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
        usage = chunk.usage or usage
    assert [PROMPTS[i // 2] + text for i, text in enumerate(streamed)] == expected
    assert reasons == [choice.finish_reason for choice in answer.choices] and usage == answer.usage


@pytest.mark.parametrize("model", ["full", "blocks", "causal"])
def test_chats_equal_the_library(client, lms, model):
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "a cat?"}]
    options = STEPS if model == "full" else {"threshold": 0.3} if model == "blocks" else {}
    expected = lms[model].respond([messages, messages], 10, seed=5, **library_settings(model, options))
    request = {"model": model, "messages": messages, "n": 2, "max_tokens": 10, "seed": 5, "extra_body": options}
    answer = client.chat.completions.create(**request, logprobs=True, top_logprobs=2)
    assert [choice.message.content for choice in answer.choices] == expected
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in answer.choices[0].logprobs.content)
    streamed, roles = ["", ""], ["", ""]
    for chunk in client.chat.completions.create(**request, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role or ""
    assert streamed == expected and roles == ["assistant"] * 2


def test_infill_equals_the_library(client, lms):
    texts = ["Zoë <mask:3> sat — <mask>.", "a <mask:2-4> the"]
    expected = lms["full"].infill(texts, gap_length=5, seed=1, **STEPS)
    request = {"model": "full", "prompt": texts, "seed": 1, "extra_body": {"infill": True, "gap_length": 5, **STEPS}}
    answer = client.completions.create(**request)
    assert [choice.text for choice in answer.choices] == expected
    assert [len(choice.gaps) for choice in answer.choices] == [2, 1]
    first = answer.choices[0]
    assert first.text == f"Zoë {first.gaps[0]} sat — {first.gaps[1]}." and first.finish_reason == "stop"
    streamed = ["", ""]
    for chunk in client.completions.create(**request, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_suffix(client, lms):
    request = {"model": "full", "suffix": " mat.", "max_tokens": 4, "seed": 2, "extra_body": STEPS}
    answer = client.completions.create(prompt="a cat ", **request)
    assert "a cat " + answer.choices[0].text + " mat." == lms["full"].infill("a cat <mask:4> mat.", seed=2, **STEPS)[0]
    ids, = tokenize(lms["full"].tokenizer, ["a cat"])
    by_id = client.completions.create(prompt=[0, *ids], **request)
    assert by_id.choices[0].text == answer.choices[0].text


def test_token_ids_and_echo(client, lms):
    ids, = tokenize(lms["causal"].tokenizer, ["Zoë and"])
    text, by_id = (client.completions.create(model="causal", prompt=prompt, max_tokens=6, seed=4, echo=True)
                   for prompt in ("Zoë and", [0, *ids]))
    assert text.choices[0].text == by_id.choices[0].text
    assert text.choices[0].text == lms["causal"].generate("Zoë and", 6, policy="autoregressive", seed=4)[0]
    nothing = client.completions.create(model="full", prompt="Zoë", max_tokens=0, echo=True)
    assert nothing.choices[0].text == "Zoë" and nothing.usage.completion_tokens == 0


def test_stop(client):
    """The text is what it is without the stop string, up to it; what is not needed is not counted."""
    request = {"model": "causal", "prompt": "a", "max_tokens": 60, "seed": 9}
    whole = client.completions.create(**request)
    text = whole.choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    answer = client.completions.create(**request, stop=[stop, "nowhere"], logprobs=1)
    choice = answer.choices[0]
    assert choice.text == text[: text.index(stop)] and choice.finish_reason == "stop"
    assert answer.usage.completion_tokens < whole.usage.completion_tokens
    assert all(offset < len(choice.text) for offset in choice.logprobs.text_offset)
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**request, stop=stop, stream=True))
    assert streamed == choice.text


@pytest.mark.parametrize(("max_tokens", "prompt_kind"), [(0, "ids"), (1, "ids"), (1, "text")])
def test_log_probs_of_a_prompt(client, lms, max_tokens, prompt_kind):
    """As lm-eval asks for them: each token given those before it, by one causal pass."""
    lm = lms["causal"]
    own, = tokenize(lm.tokenizer, ["the cat sat on"])
    prompts, row = (["the cat sat on"], [0, *own]) if prompt_kind == "text" else ([own, own[:3]], own)
    answer = client.completions.create(model="causal", prompt=prompts, max_tokens=max_tokens, echo=True, logprobs=3,
                                       temperature=0)
    found = answer.choices[0].logprobs
    logits = np.asarray(lm.logits([row], AttentionMask.causal())[0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = [log_p[i - 1, row[i]] for i in range(len(row) - len(own) + 1, len(row))]
    assert len(found.tokens) == len(own) + max_tokens and found.token_logprobs[0] is None
    np.testing.assert_allclose(found.token_logprobs[1 : len(own)], expected, atol=1e-4)
    for i, (value, top) in enumerate(zip(found.token_logprobs[1 : len(own)], found.top_logprobs[1:], strict=False), 1):
        at = i + len(row) - len(own) - 1
        assert max(top.values()) == pytest.approx(log_p[at].max(), abs=1e-4)
        assert (value == max(top.values())) == (row[at + 1] == log_p[at].argmax())
    if max_tokens:
        assert found.token_logprobs[-1] == pytest.approx(log_p[-1].max(), abs=1e-4)
    if prompt_kind == "ids":
        assert len(answer.choices[1].logprobs.tokens) == 3 + max_tokens


@pytest.mark.parametrize("echo", [False, True])
def test_log_probs_without_other_tokens(client, echo):
    """0 asks for those of the text alone; omitted, for none."""
    request = {"model": "causal", "prompt": "a cat", "max_tokens": 4, "seed": 3, "echo": echo}
    none, some, more = (client.completions.create(**request, **fields).choices[0].logprobs
                        for fields in ({}, {"logprobs": 0}, {"logprobs": 2}))
    assert none is None and set(some.top_logprobs) == {None} and len(some.tokens) >= 4
    assert (some.tokens, some.token_logprobs) == (more.tokens, more.token_logprobs)


def test_stream_of_steps(client, lms):
    """The changes lead from the row of step 0 to the final text, and the texts to the same."""
    request = {"model": "full", "prompt": "a cat", "max_tokens": 8, "seed": 6, "n": 2,
               "extra_body": {"stream_steps": True, **STEPS}}
    rows, texts, streamed = [{}, {}], ["", ""], ["", ""]
    for chunk in client.completions.create(**request, stream=True):
        step = chunk.step
        if step["step"] == 0:
            assert [token["position"] for token in step["tokens"]] == [*range(len(step["tokens"]))]
            assert all(token["given"] == (token["id"] is not None) for token in step["tokens"])
        rows[step["index"]].update({token["position"]: token["id"] for token in step["tokens"]})
        texts[step["index"]] = step["text"]
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert ["a cat" + text for text in streamed] == texts == lms["full"].generate(["a cat"] * 2, 8, seed=6, **STEPS)
    tokens = [[row[position] for position in range(len(row))] for row in rows]
    assert all(None not in row[: row.index(0, 1) if 0 in row[1:] else None] for row in tokens)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["full", "blocks", "causal"]
    blocks = client.models.retrieve("blocks").dlm
    assert blocks["block_length"] == 4 and blocks["default_policy"] == "threshold" and blocks["has_chat_template"]
    assert blocks["default_sampling"] == {"policy": "threshold"}
    assert client.models.retrieve("causal").dlm["policies"] == ["autoregressive"]


def test_seed_is_random_and_said(client):
    request = {"model": "full", "prompt": "a", "max_tokens": 8, "extra_body": STEPS}
    first, second = client.completions.create(**request), client.completions.create(**request)
    assert first.seed != second.seed
    assert client.completions.create(**request, seed=first.seed).choices[0].text == first.choices[0].text


def test_warm_up_covers_requests_without_settings(engine, lms):
    """The rows that are compiled at the start have the shapes and kinds of the most usual requests."""
    for name, lm in lms.items():
        model = ServedModel.make(name, lm)
        prompt = "the cat"
        plans = [plan_completion(model, CompletionRequest(model=name, prompt=prompt)),
                 plan_completion(model, CompletionRequest(model=name, prompt=prompt, max_tokens=64))]
        if name == "full":
            plans.append(plan_completion(model, CompletionRequest(model=name, prompt="a <mask> the", infill=True)))
        usual = [Job(name, plan.choices[0].tokens, plan.spec, lambda update: None) for plan in plans]
        found, warm = (({(row.shape, spec) for row, spec in map(engine._prepare, jobs)})
                       for jobs in (usual, warm_up_jobs(model)))
        assert found <= warm, name
