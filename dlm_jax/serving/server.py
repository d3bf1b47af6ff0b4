"""Runs the service with uvicorn until a signal ends it; what has started is finished first."""

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from dlm_jax.errors import ConfigError
from dlm_jax.serving.app import Service

DRAIN_SECONDS = 25  # for what runs when the server is told to stop: less than the 30 s that orchestrators wait
_MAX_CONNECTIONS = 512  # fewer than the 1024 open files that a process may usually have
_KEEP_ALIVE_SECONDS = 30
_HEAD_SECONDS = 30  # how long a client may take to send the head of a request; `AppConfig.body_seconds` is for the rest


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound and does not listen yet: until the model is ready, connections are refused.

    Raises:
      ConfigError: the address is not this machine's, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                                flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"there is no address {host!r} to serve at ({error}); name one of this machine, such as "
                          "127.0.0.1") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError(f"the server cannot listen at {host}, port {port} ({error.strerror}); choose another "
                          "port") from error
    return bound


def address(bound: socket.socket) -> str:
    """Returns the address of a bound socket, as in a URL."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(service: Service, bound: socket.socket, ready: Callable[[], None]) -> None:
    """Serves until SIGTERM or Ctrl-C, then finishes what runs, for at most `DRAIN_SECONDS`.

    Args:
      ready: called once connections are accepted.
    """
    # uvicorn raises the signal once more at its end: one that stopped the server as it should has no further effect.
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        _Server(uvicorn_config(service.app), service, ready).run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, previous)


def uvicorn_config(app: ASGIApp) -> uvicorn.Config:
    """Returns the settings of uvicorn."""
    return uvicorn.Config(app, http=_Protocol, ws="none", lifespan="off", log_level="error", access_log=False,
                          server_header=False, timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                          timeout_graceful_shutdown=DRAIN_SECONDS, limit_concurrency=_MAX_CONNECTIONS)


class _Protocol(H11Protocol):
    """uvicorn's protocol, which also closes connections on which no request's head arrives in time."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        if self._timer is None and self._is_waiting():
            self._timer = self.loop.call_later(_HEAD_SECONDS, self._close)
        elif self._timer is not None and not self._is_waiting():
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._timer = None
        if self._is_waiting():
            self.transport.close()

    def _is_waiting(self) -> bool:
        """Returns whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete


class _Server(uvicorn.Server):
    """A server that says when it is ready, and refuses new requests while it stops."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]):
        super().__init__(config)
        self._service, self._ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.stopping = True
        super().handle_exit(sig, frame)
