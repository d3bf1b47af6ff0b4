import numpy as np
import pytest

from dlm_jax.data import rows as row_files
from dlm_jax.errors import DataError


def blocks(count: int = 3, length: int = 4):
    for block in range(count):
        tokens = np.arange(2 * length, dtype=np.int32).reshape(2, length) + 100 * block
        yield tokens, np.ones_like(tokens)


@pytest.mark.parametrize("segments", [False, True])
def test_what_is_written_is_read_back(tmp_path, segments):
    row_files.write(tmp_path / "rows", blocks(), length=4, segments=segments)
    rows = row_files.read(tmp_path / "rows")
    assert (len(rows), rows.length, rows.tokens.dtype) == (6, 4, np.int32)
    np.testing.assert_array_equal(rows[[4, 1]].tokens, [[200, 201, 202, 203], [4, 5, 6, 7]])
    assert (rows.segment_ids is not None) == segments
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def failing():
        yield from blocks()
        raise DataError("a bad line")

    with pytest.raises(DataError, match="a bad line"):
        row_files.write(tmp_path / "rows", failing(), length=4, segments=False)
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_writers_wins(tmp_path):
    def overtaken():
        yield from blocks(1)
        row_files.write(tmp_path / "rows", blocks(2), length=4, segments=False)

    row_files.write(tmp_path / "rows", overtaken(), length=4, segments=False)
    assert len(row_files.read(tmp_path / "rows")) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_a_truncated_file_is_refused(tmp_path):
    row_files.write(tmp_path / "rows", blocks(), length=4, segments=False)
    path = tmp_path / "rows" / "tokens.int32"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="damaged"):
        row_files.read(tmp_path / "rows")


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file/rows: the rows cannot be written"):
        row_files.write(tmp_path / "file" / "rows", blocks(), length=4, segments=False)
