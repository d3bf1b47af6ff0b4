import pickle

import numpy as np
import pytest

from dlm_jax.data.rows import Rows
from dlm_jax.data.shards import RowLayout, ShardedRows, write_shard
from dlm_jax.errors import DataError


def random_rows(count: int, length: int, vocab_size: int, row_masks: tuple[str, ...]) -> Rows:
    random = np.random.default_rng(count)
    masks = {name: random.random((count, length)) < 0.3 for name in row_masks}
    return Rows(random.integers(0, vocab_size, (count, length)).astype(np.uint32), **masks)


def assert_same(a: Rows, b: Rows) -> None:
    assert a.row_masks == b.row_masks
    for name in ("tokens", *a.row_masks):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("row_masks", [(), ("starts",), ("starts", "noisable_mask"), ("noisable_mask",)])
@pytest.mark.parametrize(("vocab_size", "length"), [(512, 16), (65_536, 13), (65_537, 16), (128_256, 3)])
def test_layout_round_trip(row_masks, vocab_size, length):
    layout, rows = RowLayout.for_vocab(length, vocab_size, row_masks), random_rows(7, length, vocab_size, row_masks)
    encoded = layout.encode(rows)
    assert encoded.shape == (7, layout.row_bytes)
    assert layout.row_bytes == length * (2 if vocab_size <= 65_536 else 4) + len(row_masks) * -(-length // 8)
    assert_same(layout.decode([row.tobytes() for row in encoded]), rows)


@pytest.fixture
def written(tmp_path):
    layout, rows = RowLayout.for_vocab(8, 300, ("starts",)), random_rows(30, 8, 300, ("starts",))
    encoded = layout.encode(rows)
    shards = [write_shard(str(tmp_path), "a.array_record", [encoded[:4], encoded[4:11]]),
              write_shard(str(tmp_path), "b.array_record", [encoded[11:]])]
    return tmp_path, shards, layout, rows


def test_random_access_after_pickling(written):
    directory, shards, layout, rows = written
    files = pickle.loads(pickle.dumps(ShardedRows(str(directory), shards, layout)))
    assert (len(files), files.length, files.row_masks) == (30, 8, ("starts",))
    order = np.random.default_rng(0).integers(0, 30, 100)
    assert_same(files[order], rows[order])
    assert_same(files[slice(3, 14)], rows[3:14])
    assert len(files[np.asarray([], int)]) == 0
    assert sorted(path.name for path in directory.iterdir()) == ["a.array_record", "b.array_record"]


def test_truncated_and_missing_files_are_named(written):
    directory, shards, layout, _ = written
    path = directory / "b.array_record"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"b\.array_record"):
        ShardedRows(str(directory), shards, layout)
    path.unlink()
    with pytest.raises(DataError, match=r"b\.array_record"):
        ShardedRows(str(directory), shards, layout)
    (directory / "file").touch()
    with pytest.raises(DataError, match=r"file/a\.array_record"):
        write_shard(str(directory / "file"), "a.array_record", [])


def test_flipped_bit_is_detected_when_its_row_is_read(written):
    directory, shards, layout, rows = written
    path = directory / "a.array_record"
    content = bytearray(path.read_bytes())
    content[bytes(content).index(layout.encode(rows[[5]]).tobytes()) + 3] ^= 4
    path.write_bytes(content)
    files = ShardedRows(str(directory), shards, layout)
    assert_same(files[np.asarray([4, 6])], rows[[4, 6]])
    with pytest.raises(DataError):
        files[np.asarray([5])]
