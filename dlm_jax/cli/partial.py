"""Lines of output that a command adds to until they are all there: stopped, the same command goes on.

    out.jsonl.partial         the lines that are done
    out.jsonl.partial.json    the settings they were made with
    out.jsonl                 all of them, at the end
"""

import json
import os
import pathlib
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from dlm_jax.errors import ConfigError
from dlm_jax.storage import write_json


def check_output(path: str) -> None:
    """Raises ConfigError if there is something where the output would go, or no folder for it."""
    out = pathlib.Path(path)
    if out.exists():
        raise ConfigError(f"{out} is there already; name another file, or remove it")
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent} for {out.name}; make it, or name another")


class ResumeState:
    """The lines of `out` so far, `done` of them; what is left of a line that broke off is removed.

    Raises:
      ConfigError: the lines that are there were made with other settings, or no one knows with which.
    """

    def __init__(self, out: str, settings: dict[str, Any]):
        self._out, self._settings = out, settings
        self._path, self._settings_path = pathlib.Path(f"{out}.partial"), pathlib.Path(f"{out}.partial.json")
        content = self._path.read_bytes() if self._path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole:
            self._check_settings()
        else:
            write_json(self._settings_path, settings)
        self._file = self._path.open("ab")
        self._file.truncate(len(whole))
        self.done = whole.count(b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if isinstance(error, KeyboardInterrupt):
            print(f"{self.done} lines are in {self._path}; the same command goes on", file=sys.stderr)

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        self._file.flush()
        self.done += len(lines)

    def finish(self) -> None:
        """All lines are there: they become the output."""
        self._file.close()
        os.replace(self._path, self._out)
        self._settings_path.unlink(missing_ok=True)

    def _check_settings(self) -> None:
        try:
            saved = json.loads(self._settings_path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._path} has no readable {self._settings_path.name} beside it, which says how it "
                              "was made; remove it to begin anew") from error
        changed = [f"{key}: {saved.get(key)!r} -> {self._settings.get(key)!r}" for key in {**saved, **self._settings}
                   if saved.get(key) != self._settings.get(key)]
        if changed:
            raise ConfigError(f"{self._path} was begun with something else ({'; '.join(changed)}); run the command as "
                              "it was, name another output, or remove this file to begin anew")
