"""Local folders and object stores (`gs://`) alike.

A disk can rename, so what is written there is written beside and renamed. An object store cannot: a folder there is
complete when the one file that marks it so, written last, is there.
"""

import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

from etils import epath

from dlm_jax.errors import ConfigError


def is_remote(path: epath.PathLike) -> bool:
    """Whether it is on an object store."""
    remote = "://" in os.fspath(path)
    if remote:
        _keep_no_listings()
    return remote


@functools.cache
def _keep_no_listings() -> None:
    """Other processes and libraries write to a bucket too, so a listing of it grows old at once."""
    import fsspec  # with all its compressors, which who reads local files need not wait for

    for protocol in ("gs", "gcs"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def reached(path: epath.PathLike) -> epath.Path:
    """The path, when it is known that its store can be reached.

    Raises:
      ConfigError: what reads this kind of path is not installed, or the store cannot be reached.
    """
    if not is_remote(path):
        return epath.Path(path)
    scheme = os.fspath(path).partition("://")[0]
    try:
        epath.Path(path).exists()
    except ImportError as error:
        raise ConfigError(f"{path} cannot be reached without a package for {scheme}://: pip install 'dlm-jax[gcs]' "
                          "for gs://") from error
    except Exception as error:  # each store has errors of its own: of credentials, of the network, of a missing bucket
        reason = " ".join(" ".join(map(str, error.args)).split())[:300]
        raise ConfigError(f"{path} cannot be reached: {reason or error!r}") from error
    return epath.Path(path)


def cache_folder() -> Path:
    """This machine's folder for what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dlm_jax"


def write_json(path: epath.Path, content: object) -> None:
    """Whole or not at all."""
    text = json.dumps(content, indent=1) + "\n"
    if is_remote(path):  # an object appears when all of it is there
        path.write_text(text)
        return
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    os.replace(beside, path)


def upload(folder: Path, to: epath.Path, *, last: str | None = None) -> None:
    """Copies all files below a local folder; the one named `last` comes last and marks the copy as complete."""
    files = sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
    for name in sorted(files, key=lambda name: name == last):
        target = to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "rb") as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 24)


def files_below(folder: epath.Path, above: str = "") -> list[str]:
    """Names below a folder, as a/b, sorted."""
    names = []
    for path in folder.iterdir():
        name = above + path.name
        names += files_below(path, name + "/") if path.is_dir() else [name]
    return sorted(names)


def move(folder: epath.Path, to: epath.Path) -> None:
    """Renames a folder; on an object store by copying, so that an interruption leaves both."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if not is_remote(folder):
        folder.rename(to)
        return
    for name in files_below(folder):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).copy(to / name, overwrite=True)
    folder.rmtree()


def local_copy(directory: epath.PathLike) -> Path:
    """A local folder with the files (not the folders) of a remote one; a local one as it is.

    It is kept in the user's cache, and what has the size it has there is not fetched again.
    """
    if not is_remote(directory):
        return Path(directory)
    name = hashlib.sha256(os.fspath(directory).rstrip("/").encode()).hexdigest()[:16]
    folder = cache_folder() / "copies" / name
    folder.mkdir(parents=True, exist_ok=True)
    files = [path for path in reached(directory).iterdir() if path.is_file()]
    for path in folder.iterdir():
        if path.name not in {file.name for file in files}:
            path.unlink()
    for path in files:
        copy = folder / path.name
        if not copy.exists() or copy.stat().st_size != path.stat().length or path.suffix == ".json":
            beside = folder / f".{path.name}.{os.getpid()}"
            with path.open("rb") as source, beside.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 24)
            os.replace(beside, copy)
    return folder
