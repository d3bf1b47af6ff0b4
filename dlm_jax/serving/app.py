"""The HTTP side of `dlm serve`: requests come in, jobs go to the engine, and texts go out, entire or in chunks.

A request is read and checked before the engine sees any of it. Its jobs are cancelled when it ends, whether it was
answered, failed, ran out of time or was left by its client.
"""

import asyncio
import base64
import collections
import dataclasses
import hashlib
import hmac
import ipaddress
import json
import logging
import pathlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any

from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from dlm_jax.errors import DLMError
from dlm_jax.serving.answer import Run, prompt_log_probs
from dlm_jax.serving.engine import Engine, EngineStopped
from dlm_jax.serving.jobs import Plan, ServedModel, infer_lengths, plan_chat, plan_completion, unknown_lengths
from dlm_jax.serving.metrics import ServerMetrics
from dlm_jax.serving.protocol import ChatRequest, CompletionRequest, RequestError, SamplingRequest, parse_request
from dlm_jax.serving.queue import QueueFull

_CLIENT_GONE = 499  # nobody reads the answer: a status for the metrics
_DRAIN = 16  # times the limit: how much of a body that is too large is read, so that the client sees the refusal
_PAGE_POLICY = ("default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; connect-src 'self'; "
                "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}


@dataclasses.dataclass(frozen=True)
class AppConfig:
    """What a server allows.

    Attributes:
      api_key: what requests must carry; None: nothing.
      hosts: the names by which it is addressed; None: any. On loopback without a key a page of another site could
        otherwise reach it, by a name that resolves to this machine (DNS rebinding).
      max_body: bytes of a request.
      body_seconds: how long a client may take to send a request.
      send_seconds: how long it may take to receive a chunk of a stream.
      time_limit: seconds for a request, from its last byte to the end of its answer.
    """

    api_key: str | None = None
    hosts: frozenset[str] | None = None
    max_body: int = 1 << 20
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    time_limit: float = 300.0


class Service:
    """The endpoints.

    Attributes:
      app: the ASGI application.
      stopping: whether new requests are refused, because the server finishes what runs.
    """

    def __init__(self, engine: Engine, models: Mapping[str, ServedModel], config: AppConfig):
        AppStatus.disable_automatic_graceful_drain()  # a stream ends by itself, also when the server stops
        self._engine, self._models, self._config = engine, models, config
        self._created, self.stopping = int(time.time()), False
        self.metrics = ServerMetrics(engine)
        self._page, self._page_headers = _read_page()
        # Tokenizers are not made for several threads, and an encoding is short beside its answer.
        self._encoding = asyncio.Lock()
        routes = [
            Route("/", self._get_page, methods=["GET"]),
            Route("/health", self._get_health, methods=["GET"]),
            Route("/metrics", self._get_metrics, methods=["GET"]),
            Route("/v1/models", self._list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._get_model, methods=["GET"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        starlette = Starlette(routes=routes, exception_handlers={
            DLMError: _dlm_error, HTTPException: _http_error, ClientDisconnect: _client_gone, Exception: _bug})
        starlette.router.redirect_slashes = False
        self.app = self.metrics.measure(starlette)

    async def _get_page(self, request: Request) -> Response:
        self._check_host(request)
        return Response(self._page, media_type="text/html", headers=self._page_headers)

    async def _get_health(self, request: Request) -> Response:
        del request
        return _json({"status": "stopping"}, 503) if self.stopping else _json({"status": "ok"})

    async def _get_metrics(self, request: Request) -> Response:
        self._check_access(request)
        content, media_type = self.metrics.render()
        return Response(content, media_type=media_type)

    async def _list_models(self, request: Request) -> Response:
        self._check_access(request)
        return _json({"object": "list", "data": [model.card(self._created) for model in self._models.values()]})

    async def _get_model(self, request: Request) -> Response:
        self._check_access(request)
        return _json(self._model(request.path_params["name"]).card(self._created))

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, CompletionRequest, plan_completion)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest, plan_chat)

    def _check_host(self, request: Request) -> None:
        host = request.headers.get("host", "").rpartition("@")[2]
        host = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        if self._config.hosts is not None and host.lower() not in self._config.hosts:
            raise RequestError(f"this server is for this machine alone, and was addressed as {host[:80]!r}; use "
                               "localhost, or start it with --api_key", 403, code="host_not_allowed")

    def _check_access(self, request: Request) -> None:
        self._check_host(request)
        if self._config.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode(), self._config.api_key.encode())
        if scheme.lower() != "bearer" or not right:
            raise RequestError("the API key is missing or wrong; send it as Authorization: Bearer KEY", 401,
                               code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _model(self, name: str) -> ServedModel:
        if name not in self._models:
            raise RequestError(f"there is no model {name[:80]!r}; this server has {', '.join(self._models)}", 404,
                               param="model", code="model_not_found")
        return self._models[name]

    async def _answer(self, request: Request, kind: type[SamplingRequest],
                      plan: Callable[[ServedModel, Any], Plan]) -> Response:
        self._check_access(request)
        body = await self._read(request)
        if self.stopping:
            raise RequestError("the server is stopping; ask another, or again when it is back", 503)
        deadline = _Deadline(self._config.time_limit)
        run = await _unless_client_leaves(request, self._start(body, kind, plan, deadline))
        if run.request.stream:
            return _Stream(run, self._chunks(run, deadline), self._config.send_seconds)
        try:
            return await _unless_client_leaves(request, self._whole(run, deadline))
        finally:
            run.cancel()

    async def _start(self, body: bytes, kind: type[SamplingRequest], plan_request: Callable[[ServedModel, Any], Plan],
                     deadline: "_Deadline") -> Run:
        """Returns the request as jobs that the engine has accepted."""
        asked = await run_in_threadpool(parse_request, body, kind)
        model = self._model(asked.model)
        async with self._encoding:
            plan = await run_in_threadpool(plan_request, model, asked)
        if unknown_lengths(plan):
            plan = await deadline.wait(asyncio.wrap_future(self._engine.call(lambda: infer_lengths(model, plan))))
        echo = [None] * len(plan.choices)
        if not asked.is_chat and asked.echo and asked.shows_log_probs:
            echo = await prompt_log_probs(self._engine, model, plan, asked.num_top, deadline.wait)
        run = Run(model, asked, plan, echo)
        try:  # in another thread, as the check of a row may wait for the device
            await deadline.wait(run_in_threadpool(run.submit, self._engine))
        except BaseException:
            run.cancel()
            raise
        return run

    async def _read(self, request: Request) -> bytes:
        """Returns the body; refuses one that is too large, too slow or not declared as JSON."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        most, chunks, size = self._config.max_body, collections.deque[bytes](), 0

        async def read() -> None:
            nonlocal size
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    chunks.append(chunk)
                elif size > _DRAIN * most:
                    return

        try:
            await asyncio.wait_for(read(), self._config.body_seconds)
        except TimeoutError as error:
            raise RequestError(f"the request did not arrive within {self._config.body_seconds:g} s", 408,
                               headers={"Connection": "close"}) from error
        if size > most:
            raise RequestError(f"the request has more than {most:,} bytes, the most that this server reads", 413,
                               headers={"Connection": "close"})
        if kind != "application/json":  # other types may be sent by a page of another site without asking
            raise RequestError("send the request as JSON, with Content-Type: application/json", 415)
        return b"".join(chunks)

    async def _whole(self, run: Run, deadline: "_Deadline") -> Response:
        """Returns the entire answer."""
        async for _ in self._updates(run, deadline):
            pass
        self.metrics.count_usage(run.usage)
        return _json(run.body())

    async def _chunks(self, run: Run, deadline: "_Deadline") -> AsyncIterator[dict[str, str]]:
        """Yields the answer in chunks, as events."""
        try:
            for chunk in run.first_chunks():
                yield _event(chunk)
            has_text = False
            async for chunks in self._updates(run, deadline):
                if chunks and not has_text:
                    self.metrics.first_text.observe(deadline.elapsed)
                    has_text = True
                for chunk in chunks:
                    yield _event(chunk)
            self.metrics.count_usage(run.usage)
            if run.request.include_usage:
                yield _event(run.usage_chunk())
        except RequestError as error:
            yield _event(error.body)
            return
        yield {"data": "[DONE]"}

    async def _updates(self, run: Run, deadline: "_Deadline") -> AsyncIterator[list[dict[str, Any]]]:
        """Yields what each update of the engine adds, until all rows are complete."""
        while not run.is_complete:
            index, update = await deadline.wait(run.next_update())
            if update.error is not None:
                raise RequestError(update.error, 503 if self.stopping else 500)
            yield run.update(index, update)


class _Deadline:
    """The time at which a request must be answered."""

    def __init__(self, seconds: float):
        self._seconds, self._start = seconds, time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    async def wait(self, awaitable: Awaitable[Any]) -> Any:
        try:
            return await asyncio.wait_for(awaitable, max(self._seconds - self.elapsed, 0.001))
        except TimeoutError as error:
            raise RequestError(f"the answer took longer than {self._seconds:g} s, this server's time limit; ask for "
                               "fewer tokens or steps", 504, code="timeout") from error


class _Stream(EventSourceResponse):
    """A stream whose jobs are cancelled when it ends in any way."""

    def __init__(self, run: Run, chunks: AsyncIterator[dict[str, str]], send_seconds: float):
        super().__init__(chunks, sep="\n", send_timeout=send_seconds, headers=_HEADERS)
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except TimeoutError:
            logging.getLogger(__name__).warning("a client did not read its stream, which is ended")
        finally:
            self._run.cancel()


async def _unless_client_leaves(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """Returns the result of `work`, or cancels it and raises ClientDisconnect when the client leaves."""
    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _event(chunk: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(chunk, ensure_ascii=False, allow_nan=False, separators=(",", ":"))}


def _json(body: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(body, status, headers={**_HEADERS, **(headers or {})})


async def _dlm_error(request: Request, error: Exception) -> Response:
    del request
    if isinstance(error, QueueFull):
        error = RequestError(str(error), 429, code="queue_full", headers={"Retry-After": "1"})
    elif isinstance(error, EngineStopped):
        error = RequestError(str(error), 503)
    elif not isinstance(error, RequestError):
        error = RequestError(str(error))
    return _json(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code
    message = {404: f"there is nothing at {request.url.path[:80]}; the API is under /v1",
               405: f"{request.method} is not for {request.url.path[:80]}"}.get(status, error.detail)
    return _json(RequestError(message, status).body, status, error.headers)


async def _client_gone(request: Request, error: Exception) -> Response:
    del request, error
    return Response(status_code=_CLIENT_GONE)


async def _bug(request: Request, error: Exception) -> Response:
    del request, error  # the server's log has its trace
    return _json(RequestError("the server failed at this request; its log says why", 500).body, 500)


def _read_page() -> tuple[bytes, dict[str, str]]:
    """Returns the page and its headers, which allow its own scripts by their hashes and no others."""
    page = pathlib.Path(__file__).with_name("page.html").read_bytes()
    scripts = re.findall(rb"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" for script in scripts]
    return page, {**_HEADERS, "Cache-Control": "no-cache",
                  "Content-Security-Policy": _PAGE_POLICY.format(scripts=" ".join(hashes) or "'none'")}


def is_loopback(host: str) -> bool:
    """Returns whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
