"""A server that speaks the protocol of `dlm serve` and invents its text, for tests of the page."""

import asyncio
import contextlib
import json
import pathlib
import random
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

_PAGE = pathlib.Path(__file__).parents[2] / "dlm_jax" / "serving" / "page.html"
_FULL = {"max_length": 256, "default_policy": "confidence", "block_length": None, "has_chat_template": False,
         "policies": ["random", "confidence", "threshold", "autoregressive"], "has_mask_token": True,
         "drafter": "none", "parent": False}
MODELS = {"full": _FULL, "blocks": _FULL | {"block_length": 4, "default_policy": "threshold"},
          "chat": _FULL | {"has_chat_template": True},
          "parent": _FULL | {"policies": ["autoregressive"], "default_policy": "autoregressive",
                             "has_mask_token": False, "parent": True}}
END = "<|end|>"


class MockServer:
    """Fills gaps with `words` in turn, two per step in random order.

    Attributes:
      words: what each token adds to the text; END ends it.
      key: the API key; "": none.
      pause: clear it and no step follows.
      failure: the message of an error after the second step; "": none.
      bodies: the requests so far.
      left: set when a client has gone in mid-stream.
    """

    def __init__(self) -> None:
        self.reset()
        app = Starlette(routes=[
            Route("/", lambda request: HTMLResponse(_PAGE.read_text())), Route("/v1/models", self._models),
            Route("/v1/completions", self._fill, methods=["POST"]),
            Route("/v1/chat/completions", self._fill, methods=["POST"])])
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))

    def reset(self) -> None:
        self.words = [" and", " then", " she", " saw", " it", "."]
        self.key, self.failure, self.bodies = "", "", []
        self.pause, self.left = threading.Event(), threading.Event()
        self.pause.set()

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Yields the address of the page."""
        thread = threading.Thread(target=self._server.run, daemon=True)
        thread.start()
        while not self._server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/"
        self._server.should_exit = True
        thread.join()

    def _models(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return _refuse(401, "the API key is wrong")
        return JSONResponse({"object": "list", "data": [{"id": name, "dlm": dlm} for name, dlm in MODELS.items()]})

    async def _fill(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if body.get("temperature", 1) < 0:
            return _refuse(400, f"temperature is {body['temperature']}")
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    def _row(self, body: dict[str, Any]) -> list[str | None]:
        """Returns the tokens of a request, None where masked."""
        prompt = body.get("prompt", "") + "".join(f"<|{m['role']}|>{m['content']}" for m in body.get("messages", []))
        if not body.get("infill"):
            prompt += "<|assistant|>" * ("messages" in body) + f"<mask:{body['max_tokens']}>"
        row: list[str | None] = [] if "messages" in body or prompt.startswith("<|") else [END]
        for gap, text in re.findall(r"<mask:(\d+)>|(<\|\w+\|>|\s?\w+|.)", prompt, re.DOTALL):
            row += [None] * int(gap) if gap else [text]
        return row

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        def event(text: str = "", **more: Any) -> str:
            choice = {"delta": {"content": text}} if "messages" in body else {"text": text}
            chunk = {"choices": [{"index": 0, **choice}], "seed": body.get("seed", 7), **more}
            return f"data: {json.dumps(chunk)}\r\n\r\n"

        def token(position: int, text: str | None, **more: Any) -> dict[str, Any]:
            special = {"special": True} if text and text.startswith("<|") else {}
            return {"position": position, "id": text and 1, "text": text, **special, **more}

        row = self._row(body)
        gaps = [i for i, text in enumerate(row) if text is None]
        filled = {gap: self.words[k % len(self.words)] for k, gap in enumerate(gaps)}
        rng = random.Random(body.get("seed", 7))
        try:
            yield event(step={"index": 0, "step": 0, "tokens": [token(i, text, given=text is not None, logprob=None)
                                                                for i, text in enumerate(row)]})
            order = gaps if body.get("policy") == "autoregressive" else rng.sample(gaps, len(gaps))
            steps = [order[i : i + 2] for i in range(0, len(order), 2)]
            for number, positions in enumerate(steps, 1):
                while not self.pause.is_set():
                    await asyncio.sleep(0.02)
                if self.failure and number == 3:
                    yield f"data: {json.dumps({'error': {'message': self.failure}})}\r\n\r\n"
                    return
                yield event(step={"index": 0, "step": number, "tokens": [
                    token(i, filled[i], logprob=-3 * rng.random()) for i in positions]})
            yield event("".join(filled.values()))
            yield event(usage={"completion_tokens": len(gaps), "forward_passes": len(steps), "tokens_per_pass": 2.0})
            yield "data: [DONE]\r\n\r\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.left.set()
            raise


def _refuse(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}},
                        status)
