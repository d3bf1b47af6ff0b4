"""A local server with the API of Google Cloud Storage, generations and preconditions included."""

import contextlib
import re
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest

_OBJECT = re.compile(r"(?:/storage/v1)?/b/([^/]+)/o/([^/]+)")
_UPLOAD = re.compile(r"/upload/storage/v1/b/([^/]+)/o")


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[str]:
    """Serves the bucket `bucket` from a folder; yields the address."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    lock, handle, close = threading.Lock(), emulator.Router.handle, emulator.Response.close

    def generation(handler, bucket: str, name: str) -> str:
        try:
            return handler.storage.get_file_obj(bucket, urllib.parse.unquote(name))["generation"]
        except Exception:  # no such object
            return "0"

    def guarded(self, method: str) -> None:
        """Handles one request at a time and checks its precondition, which the emulator ignores."""
        handler = self._request_handler
        path, _, query = handler.path.partition("?")
        query = dict(urllib.parse.parse_qsl(query))
        with lock:
            if (match := _UPLOAD.fullmatch(path)) and "ifGenerationMatch" in query:
                found = generation(handler, match.group(1), query["name"])
                if query["ifGenerationMatch"] != found:
                    handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
                    response = emulator.Response(handler)
                    response.status = HTTPStatus.PRECONDITION_FAILED
                    close(response)
                    return
            handle(self, method)

    def with_generation(self) -> None:
        """Adds the generation to the content of an object, which the emulator omits."""
        path, _, query = self._handler.path.partition("?")
        if (match := _OBJECT.fullmatch(path)) and "alt=media" in query and self.status == HTTPStatus.OK:
            self["x-goog-generation"] = generation(self._handler, *match.groups())
        close(self)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator.Router, "handle", guarded)
        patch.setattr(emulator.Response, "close", with_generation)
        server = emulator.create_server("127.0.0.1", port, data_dir=str(folder), default_bucket="bucket")
        server.start()
        yield f"http://127.0.0.1:{port}"
        server.stop()
