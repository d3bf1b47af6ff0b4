"""The server's errors in OpenAI's classes, access, limits, clients that misbehave, page and metrics."""

import json
import logging
import socket
import time

import httpx
import numpy as np
import openai
import pytest

from dlm_jax.serving.app import AppConfig
from tests.serving.conftest import STEPS, connect, serving


@pytest.mark.parametrize(("fields", "param"), [
    ({"prompt": "a" * 200}, "prompt"), ({"prompt": "a" * 500_000}, "prompt"), ({"prompt": [1] * 5000}, "prompt"),
    ({"suffix": "a" * 500_000}, "prompt"), ({"max_tokens": 97}, "max_tokens"), ({"prompt": [1, 999]}, "prompt"),
    ({"prompt": ["a"] * 40, "n": 2}, "prompt"), ({"temperature": -1}, "temperature"), ({"top_p": 2}, "top_p"),
    ({"echo": True, "logprobs": 1}, "echo"), ({"extra_body": {"policy": "best"}}, "policy"),
    ({"extra_body": {"num_steps": 0}}, "num_steps"), ({"extra_body": {"drafter": "ngram", "policy": "random"}}, None),
    ({"extra_body": {"infill": True}}, None),
    ({"prompt": "<mask:999999999999>", "extra_body": {"infill": True}}, "prompt"),
    ({"prompt": f"<mask:{'9' * 5000}>", "extra_body": {"infill": True}}, "prompt"),
    ({"prompt": "<mask:1-80> a", "extra_body": {"infill": True}}, "prompt"),
    ({"model": "causal", "prompt": "<mask:3> a", "extra_body": {"infill": True}}, "policy"),
    ({"model": "causal", "extra_body": {"policy": "confidence"}}, "policy"),
    ({"model": "blocks", "suffix": "b"}, "prompt"), ({"model": "blocks", "extra_body": {"cfg_scale": 1.0}}, None),
    ({"suffix": "b", "max_tokens": 0}, "max_tokens")])
def test_bad_requests(client, fields, param):
    with pytest.raises(openai.BadRequestError) as found:
        client.completions.create(**{"model": "full", "prompt": "a"} | fields)
    assert param is None or found.value.param == param
    assert "Traceback" not in found.value.message and len(found.value.message) < 500


def test_errors_have_their_own_classes(client, server, engine):
    with pytest.raises(openai.NotFoundError) as found:
        client.completions.create(model="gpt-4", prompt="a")
    assert found.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="full", input="a")
    for status, request in ((405, {"method": "PUT", "url": "/v1/completions"}), (404, {"method": "GET", "url": "/etc"}),
                            (415, {"method": "POST", "url": "/v1/completions", "content": b"{}"})):
        answer = httpx.request(request.pop("method"), server + request.pop("url"), **request)
        assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_api_key(engine):
    with serving(engine, AppConfig(api_key="secret")) as where:
        assert len(connect(where, api_key="secret").models.list().data) == 3
        for key in ("wrong", "secre", "secret2", "secret secret"):
            with pytest.raises(openai.AuthenticationError):
                connect(where, api_key=key).models.list()
        for header in (b"Bearer s\xe9cret", b"Basic secret", b"secret", b"Bearer"):
            assert httpx.get(f"{where}/v1/models", headers=[(b"Authorization", header)]).status_code == 401
        assert httpx.get(f"{where}/v1/models").status_code == httpx.get(f"{where}/metrics").status_code == 401
        assert httpx.get(f"{where}/health").status_code == 200


def test_other_hosts_are_refused(engine):
    with serving(engine, AppConfig(hosts=frozenset({"127.0.0.1", "localhost"}))) as where:
        assert httpx.get(f"{where}/v1/models").status_code == 200
        answer = httpx.get(f"{where}/v1/models", headers={"Host": "evil.example:8000"})
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed"


def test_limits(stalled):
    """Too many rows are refused with a time to come again; what takes too long ends; both leave nothing waiting."""
    engine, release = stalled
    with serving(engine, AppConfig(time_limit=0.5)) as where:
        client = connect(where)
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model="full", prompt="a", n=9)
        assert int(full.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.InternalServerError) as late:
            client.completions.create(model="full", prompt="a", n=4)
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match="time limit"):
            list(client.completions.create(model="full", prompt="a", n=4, stream=True))
        release.set()
        assert waits_for(lambda: engine.metrics().cancelled == 8) and engine.metrics().queued == 0


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave(stalled, stream):
    """Their rows are cancelled, whether they wait for an answer or a stream."""
    body = json.dumps({"model": "full", "prompt": "a", "n": 4, "stream": stream}).encode()
    engine, release = stalled
    with serving(engine) as where:
        with connection(where) as raw:
            raw.sendall(post(body))
            assert waits_for(lambda: engine.metrics().queued == 4)
        assert waits_for(lambda: all(ticket.is_cancelled for ticket in engine._queue))
        release.set()
        assert waits_for(lambda: engine.metrics().cancelled == 4) and engine.metrics().tokens == 0
        assert httpx.get(f"{where}/health").status_code == 200


def test_max_tokens_of_the_server(engine):
    with serving(engine, max_tokens=8) as where:
        client = connect(where)
        answer = client.completions.create(model="full", prompt="a", seed=0, extra_body=STEPS)
        assert answer.usage.completion_tokens <= 8
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="full", prompt="a", max_tokens=9)


def test_slow_senders_and_large_bodies(server, monkeypatch):
    monkeypatch.setattr("dlm_jax.serving.server._HEAD_SECONDS", 0.3)
    with connection(server) as raw, httpx.Client(base_url=server) as http:
        assert http.get("/health").status_code == 200
        raw.sendall(b"GET /health HTTP/1.1\r\nHost:")
        assert raw.recv(100) == b""  # no head in time
        assert http.get("/health").status_code == 200  # on the same connection
    with connection(server) as raw:
        raw.sendall(post(b"{" * 100)[:-50])
        assert b" 408 " in raw.recv(1000)
    large = httpx.post(f"{server}/v1/completions", content=b" " * (3 << 20),
                       headers={"Content-Type": "application/json"})
    assert large.status_code == 413 and large.json()["error"]["type"] == "invalid_request_error"
    with connection(server) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                    b"Transfer-Encoding: chunked\r\n\r\n100000\r\n" + b" " * 0x100000 + b"\r\n1\r\na\r\n0\r\n\r\n")
        assert b" 413 " in raw.recv(1000)
    assert_answers(server)


def test_slow_readers(server, engine, caplog):
    """A client that does not read its stream is left, once nothing more can be sent; the others are served."""
    body = json.dumps({"model": "full", "prompt": "a", "n": 16, "max_tokens": 90, "stream": True, "stream_steps": True,
                       "num_steps": 5}).encode()
    with connection(server, receive_buffer=2048) as raw:
        raw.sendall(post(body))
        with caplog.at_level(logging.WARNING, "dlm_jax.serving.app"):
            assert waits_for(lambda: "did not read" in caplog.text, 30)
        assert_answers(server)
    assert engine.metrics().queued + engine.metrics().active == 0


HOSTILE = [
    b"", b"\x00" * 100, b"GET\r\n\r\n", b"POST /v1/completions HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"b" * 70_000,
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"]


def test_hostile_connections(server):
    """Whatever bytes come, the next client is served."""
    for data in HOSTILE:
        with connection(server) as raw:
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
            head = raw.recv(100)
            assert head == b"" or b" 4" in head[:15], (data[:60], head)
    assert_answers(server)


def test_hostile_requests(server):
    """Hundreds of requests that are wrong in random ways: each gets a 4xx in OpenAI's form."""
    rng = np.random.default_rng(0)
    values = ["", "a", "<mask>", -1, 0, 1e308, -0.5, 10**30, True, None, [], {}, [[]], ["a", 1], {"a": {"b": []}},
              "\x00", "🙂" * 300, "a" * 5000, [0] * 5000, "../../etc/passwd", "{{ 7*7 }}"]
    known = ["model", "prompt", "messages", "n", "stop", "seed", "temperature", "top_p", "max_tokens", "logprobs",
             "drafter", "policy", "cache", "suffix", "stream_options", "num_steps", "threshold", "__class__", "user\n"]
    statuses = []
    with httpx.Client(base_url=server, headers={"Content-Type": "application/json"}, timeout=30) as http:
        for i in range(300):
            path, extra = [("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {
                "messages": [{"role": "user", "content": "a"}]})][i % 2]
            fields = {"model": "full", "max_tokens": 2, **STEPS, **extra}
            for _ in range(int(rng.integers(1, 4))):
                fields[known[rng.integers(len(known))]] = values[rng.integers(len(values))]
            body = json.dumps(fields).encode()
            if rng.random() < 0.3:
                cut = int(rng.integers(len(body)))
                body = body[:cut] + bytes(rng.integers(0, 256, 3).tolist()) + body[cut + 2 :]
            answer = http.post(path, content=body)
            statuses.append(answer.status_code)
            assert answer.status_code == 200 or 400 <= answer.status_code < 500, (answer.text, body[:300])
            if answer.status_code != 200:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert statuses.count(200) < 100
    assert_answers(server)


def test_page_and_metrics(server, client):
    client.completions.create(model="full", prompt="a", seed=0, extra_body=STEPS)
    page = httpx.get(server)
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "script-src 'sha256-" in policy
    metrics = httpx.get(f"{server}/metrics").text
    assert 'dlm_http_requests_total{path="/v1/completions",status="200"}' in metrics and "dlm_engine_queued" in metrics
    assert 'dlm_tokens_total{kind="completion"}' in metrics
    assert httpx.get(f"{server}/health").json() == {"status": "ok"}


def connection(where: str, receive_buffer: int | None = None) -> socket.socket:
    raw = socket.socket()
    if receive_buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.settimeout(10)
    raw.connect(("127.0.0.1", int(where.rpartition(":")[2])))
    return raw


def post(body: bytes) -> bytes:
    return (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)) + body


def assert_answers(where: str) -> None:
    answer = connect(where).completions.create(model="full", prompt="a", max_tokens=4, seed=0, extra_body=STEPS)
    assert answer.choices[0].finish_reason


def waits_for(condition, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()
