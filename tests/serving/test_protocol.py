"""What a request may say, and the bodies of answers and errors."""

import json

import pytest

from dlm_jax.sampling import SamplerConfig
from dlm_jax.serving.protocol import (
    NEUTRAL,
    ChatRequest,
    CompletionRequest,
    RequestError,
    TokenLogProb,
    chat_log_probs,
    completion_log_probs,
    parse_request,
)


def parse(fields: dict, kind=CompletionRequest):
    return parse_request(json.dumps(fields).encode(), kind)


@pytest.mark.parametrize(("prompt", "read"), [
    ("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])])
def test_prompts(prompt, read):
    assert parse({"model": "m", "prompt": prompt}).prompt == read


@pytest.mark.parametrize("prompt", [[], None, 3, {}, [1, "a"], ["a", [1]], [[]], [[1], []], [True], [1.0], [[[1]]]])
def test_prompts_of_other_types(prompt):
    with pytest.raises(RequestError) as found:
        parse({"model": "m", "prompt": prompt})
    assert found.value.param == "prompt" and found.value.status == 400


@pytest.mark.parametrize(("fields", "param"), [
    ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": "3"}, "max_tokens"), ({"max_tokens": 2.0}, "max_tokens"),
    ({"n": 0}, "n"), ({"n": 17}, "n"), ({"n": True}, "n"), ({"seed": -1}, "seed"), ({"seed": 1 << 32}, "seed"),
    ({"logprobs": 6}, "logprobs"), ({"logprobs": True}, "logprobs"), ({"stop": ""}, "stop"), ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"), ({"stop": 3}, "stop"), ({"stream": "yes"}, "stream"), ({"model": None}, "model"),
    ({"temperature": "hot"}, "temperature"), ({"temperature": 1e999}, "temperature"), ({"drafter": "/etc"}, "drafter"),
    ({"max_token": 3}, "max_token"), ({"stream_options": {"usage": True}, "stream": True}, "stream_options.usage"),
    ({"stream_options": {}}, None), ({"stream_steps": True}, None), ({"gap_length": 3}, None),
    ({"infill": True, "suffix": "a"}, None), ({"infill": True, "max_tokens": 3}, None),
    ({"infill": True, "prompt": [1]}, None), ({"best_of": 2}, "best_of"),
    ({"presence_penalty": 0.5}, "presence_penalty"), ({"logit_bias": {"3": 1}}, "logit_bias")])
def test_refused_fields(fields, param):
    body = json.dumps({"model": "m", "prompt": "a"} | fields).replace("Infinity", "1e999").encode()
    with pytest.raises(RequestError) as found:
        parse_request(body, CompletionRequest)
    assert found.value.param == param
    error = found.value.body["error"]
    assert error["type"] == "invalid_request_error" and (param or next(iter(fields))) in error["message"]


@pytest.mark.parametrize("fields", [
    {"messages": []}, {"messages": [{"role": "user"}]}, {"messages": [{"role": "boss", "content": "a"}]},
    {"messages": [{"role": "user", "content": 3}]}, {"messages": [{"role": "user", "content": []}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]},
    {"messages": [{"role": "user", "content": "a", "tool_calls": []}]}, {"messages": "a"}, {},
    {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "max_completion_tokens": 2},
    {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
    {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]},
    {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}}])
def test_refused_chats(fields):
    with pytest.raises(RequestError):
        parse({"model": "m"} | fields, ChatRequest)


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"3", b"null", b"\xff{}", b'{"model": "\\ud800", "prompt": "a"}', b'{"model": NaN}',
    b'{"model": Infinity}', b"[" * 100_000, b'{"a":' * 100_000, b'{"seed": ' + b"9" * 5000 + b"}",
    b'{"model": "a", "model": "b"}', b'{"model": "a", "prompt": "b", "stream_options": {"x": 1, "x": 2}}'])
def test_broken_bodies(body):
    with pytest.raises(RequestError) as found:
        parse_request(body, CompletionRequest)
    assert found.value.status == 400 and len(str(found.value)) < 300


def test_neutral_values_and_nulls_change_nothing():
    neutral = {name: values[0] if values else None for name, values in NEUTRAL.items()}
    nulls = {name: None for name in (*NEUTRAL, *CompletionRequest.model_fields) if name not in ("model", "prompt")}
    plain = parse({"model": "m", "prompt": "a"})
    assert parse({"model": "m", "prompt": "a"} | neutral) == parse({"model": "m", "prompt": "a"} | nulls) == plain


def test_every_setting_of_the_sampler_is_a_field():
    fields = set(SamplerConfig.__dataclass_fields__)
    assert fields <= set(CompletionRequest.model_fields) and fields <= set(ChatRequest.model_fields)


def test_content_of_parts():
    request = parse({"model": "m", "messages": [{"role": "user", "content": [
        {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}, ChatRequest)
    assert request.messages[0].content == "a\nb"


def test_log_probs():
    tokens = [TokenLogProb("a", None, None, 0), TokenLogProb("\ufffd", -1.0, (("b", -0.5), ("\ufffd", -1.0),
                                                                            ("\ufffd", -2.0)), 1)]
    assert completion_log_probs(tokens) == {
        "tokens": ["a", "\ufffd"], "token_logprobs": [None, -1.0], "text_offset": [0, 1],
        "top_logprobs": [None, {"b": -0.5, "\ufffd": -1.0}]}
    content = chat_log_probs(tokens)["content"]
    assert [entry["bytes"] for entry in content] == [[97], None] and content[1]["top_logprobs"][0]["token"] == "b"
