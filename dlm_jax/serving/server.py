"""Runs the service with uvicorn until a signal ends it; what has started is finished first."""

import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from dlm_jax.errors import ConfigError
from dlm_jax.serving.app import Service

DRAIN_SECONDS = 25  # for what runs when the server is told to stop: less than the 30 s that orchestrators wait
_MAX_CONNECTIONS = 512  # fewer than the 1024 open files that a process may usually have
_KEEP_ALIVE_SECONDS = 30


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
    config = uvicorn.Config(service.app, http="h11", ws="none", lifespan="off", log_level="error", access_log=False,
                            server_header=False, timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                            timeout_graceful_shutdown=DRAIN_SECONDS, limit_concurrency=_MAX_CONNECTIONS)
    # uvicorn raises the signal once more at its end: one that stopped the server as it should has no further effect.
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        _Server(config, service, ready).run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, previous)


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
