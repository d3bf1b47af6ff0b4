"""What sources share: reading that may fail midway and then says how far it got, and the choice of columns."""

import abc
import zlib
from collections.abc import Iterator, Sequence

from dlm_jax.data.records import BrokenSource, Payload
from dlm_jax.errors import DataError, DLMError


class Reader(abc.ABC):
    """A `Source` in whose `_read` anything may go wrong."""

    name: str
    unit: str
    size: int | None

    def records(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Payload]:
        """The records from number `start` (of the first: 0) on.

        Args:
          columns: the keys that are needed; others may be left out. None: all.

        Raises:
          BrokenSource: it is damaged from some record on.
          DataError: it cannot be read, as where a store does not answer or no column is there.
        """
        number = start
        try:
            for payload in self._read(start, columns):
                yield payload
                number += 1
        except DLMError:
            raise
        except Exception as error:  # each format and each store has errors of its own
            if _is_damage(error):
                raise BrokenSource(f"{self.name}: damaged after {self.unit} {number} ({one_line(error)})") from error
            raise DataError(f"{self.name}: cannot be read after {self.unit} {number} ({one_line(error)})") from error

    @abc.abstractmethod
    def _read(self, start: int, columns: Sequence[str] | None) -> Iterator[Payload]: ...


def columns_in(name: str, found: Sequence[str], wanted: Sequence[str] | None) -> list[str] | None:
    """Those of the wanted columns that are there, in the order of `found`; None: all.

    Raises:
      DataError: none of them is. (Where only some are missing, records may do without, or say what they miss.)
    """
    if wanted is None:
        return None
    there = [column for column in found if column in wanted]
    if wanted and not there:
        missing = " or ".join(map(repr, wanted))
        raise DataError(f"{name}: no column {missing} (it has {', '.join(found)}); set data.text_key, or the keys of "
                        "data.examples")
    return there


def one_line(error: Exception) -> str:
    """What an error says, or at least its kind."""
    return " ".join(str(error).split()) or type(error).__name__


def _is_damage(error: Exception) -> bool:
    """Whether the content is wrong, rather than the disk or the network. (UnicodeDecodeError, JSONDecodeError and
    ArrowInvalid are ValueErrors; Arrow also raises OSErrors that no system call has numbered.)"""
    if isinstance(error, OSError):
        return error.errno is None and not isinstance(error, ConnectionError | TimeoutError)
    return isinstance(error, EOFError | ValueError | zlib.error) or type(error).__name__ == "ZstdError"
