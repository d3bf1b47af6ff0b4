import itertools
import json
import socket
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from dlm_jax.data.config import RowsConfig
from dlm_jax.data.loader import Loader, Mixture, interleaving, period_counts, random_lengths, shuffled_index
from dlm_jax.data.manifest import read_manifest
from dlm_jax.data.prepare import prepare
from dlm_jax.data.rows import Rows
from dlm_jax.data.sources import open_sources
from dlm_jax.errors import DataError

FIELDS = ("tokens", "noisable_mask", "example_index", "segment_ids", "positions")
RANDOM = np.random.default_rng(3)
WEIGHTS = [(0.69, 0.31), (0.693584, 0.306416), (0.5, 0.3, 0.2), (1.0,) * 7, (0.999, 0.001), (5.0,),
           (1 / 3, 2 / 3), *(tuple(RANDOM.dirichlet([1.0] * k).tolist()) for k in (2, 3, 6))]


def make_rows(count: int, length: int = 4, first: int = 0) -> Rows:
    """Rows whose tokens all are the row's number."""
    return Rows(np.arange(first, first + count, dtype=np.int32)[:, None] + np.zeros(length, np.int32))


def first_tokens(rows) -> list[int]:
    return rows.tokens[:, 0].tolist()


def mixed_loader() -> Loader:
    starts = np.zeros((23, 4), bool)
    starts[:, [0, 2]] = True
    sources = [Rows(make_rows(23).tokens, starts), make_rows(50)]
    return Loader(sources, 5, weights=(0.3, 0.7), seed=1, random_length=0.2)


@pytest.mark.parametrize("make", [lambda: Loader([make_rows(23)], 5, seed=1), mixed_loader])
def test_batch_of_a_step_equals_iteration(make):
    batches = make().batches()
    try:
        stream = list(itertools.islice(batches, 1001))
    finally:
        batches.close()
    for step in (1000, 0, 17, 4):
        batch = make().batch(step)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(batch, name), getattr(stream[step], name))


def test_slices_of_a_batch_make_the_batch():
    loader = Loader([make_rows(50), make_rows(9)], 8, weights=(2, 1), seed=3, random_length=0.3)
    batch = loader.batch(1000)
    slices = [loader.batch(1000, rows=slice(i, i + 2)) for i in range(0, 8, 2)]
    for name in FIELDS:
        np.testing.assert_array_equal(np.concatenate([getattr(rows, name) for rows in slices]), getattr(batch, name))


def test_epochs_continue_across_batches():
    loader = Loader([make_rows(23)], 5, seed=1)
    flat = [row for step in range(30) for row in first_tokens(loader.batch(step))]
    assert sorted(flat[:23]) == sorted(flat[23:46]) == list(range(23))
    in_order = Loader([make_rows(3)], 4, shuffle=False)
    assert first_tokens(in_order.batch(0)) + first_tokens(in_order.batch(1)) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_fields_of_a_batch():
    batch = Loader([make_rows(9)], 4).batch(6)
    assert (batch.tokens.dtype, batch.noisable_mask.dtype, batch.example_index.dtype) == (np.int32, bool, np.uint32)
    assert batch.example_index.tolist() == [24, 25, 26, 27]
    np.testing.assert_array_equal(batch.noisable_mask, [[False, True, True, True]] * 4)
    assert batch.segment_ids is None and batch.positions is None


def test_context_and_prompts_are_not_noisable():
    starts = np.asarray([[1, 0, 1, 0, 0, 1]], bool)
    batch = Loader([Rows(np.zeros((1, 6), np.int32), starts)], 1).batch(0)
    assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 2, 3]]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert batch.noisable_mask.tolist() == [[False, True, False, True, True, False]]
    responses = np.asarray([[1, 0, 0, 1, 1, 0]], bool)
    batch = Loader([Rows(np.zeros((1, 6), np.int32), noisable_mask=responses)], 1).batch(0)
    assert batch.noisable_mask.tolist() == [[False, False, False, True, True, False]]


def test_rows_of_random_length():
    loader, full = Loader([make_rows(40, 16)], 32, random_length=0.25), Loader([make_rows(40, 16)], 32)
    lengths = []
    for step in range(40):
        batch = loader.batch(step)
        np.testing.assert_array_equal(batch.tokens, full.batch(step).tokens)
        kept = batch.segment_ids == 1
        lengths += kept.sum(axis=1).tolist()
        # The kept tokens are one segment from the left; the rest is padding.
        np.testing.assert_array_equal(kept, np.arange(16) < kept.sum(axis=1, keepdims=True))
        np.testing.assert_array_equal(batch.noisable_mask, kept & (np.arange(16) > 0))
    short = [length for length in lengths if length < 16]
    assert 0.18 < len(short) / len(lengths) < 0.3
    assert set(range(2, 16)) == set(short)


def test_random_lengths_are_uniform_and_depend_on_the_example_alone():
    examples = np.arange(200_000)
    lengths = random_lengths(examples, 1.0, 11, seed=4)
    assert set(lengths.tolist()) == set(range(2, 12))
    np.testing.assert_allclose(np.bincount(lengths)[2:] / len(lengths), 0.1, atol=0.005)
    np.testing.assert_array_equal(lengths[5000:5100], random_lengths(examples[5000:5100], 1.0, 11, seed=4))
    assert (lengths != random_lengths(examples, 1.0, 11, seed=5)).any()


def test_batches_are_placed_and_errors_passed_on():
    loader = Loader([make_rows(9)], 4)

    def place(read):
        halves = [read(slice(0, 2)), read(slice(2, 4))]
        if halves[0].example_index[0] == 12:
            raise ValueError("device lost")
        return first_tokens(halves[0]) + first_tokens(halves[1])

    batches = loader.batches(1, place)
    assert [next(batches), next(batches)] == [first_tokens(loader.batch(1)), first_tokens(loader.batch(2))]
    with pytest.raises(ValueError, match="device lost"):
        next(batches)
    batches.close()


def test_closing_ends_the_threads():
    def prefetch_threads(expected: int) -> int:
        """The threads that read ahead; they end soon after the iterator is closed."""
        deadline = time.monotonic() + 10
        while (count := sum("prefetch" in thread.name for thread in threading.enumerate())) > expected \
                and time.monotonic() < deadline:
            time.sleep(0.01)
        return count

    before = prefetch_threads(0)
    batches = Loader([make_rows(9)], 4).batches()
    next(batches)
    assert prefetch_threads(99) > before
    batches.close()
    batches.close()
    assert prefetch_threads(before) == before


def test_missing_rows_and_wrong_weights_are_refused():
    for sources in ([], [make_rows(0)], [make_rows(3), make_rows(0)]):
        with pytest.raises(DataError):
            Loader(sources, 4, weights=[1.0] * len(sources))
    with pytest.raises(DataError, match="weights"):
        Mixture([make_rows(3)] * 2)
    with pytest.raises(DataError, match=r"data\.weights"):
        Mixture([make_rows(3)] * 2, (1.0, 1e-7))


@pytest.mark.parametrize("count", [1, 2, 5, 64, 1000])
def test_every_epoch_is_a_permutation(count):
    epochs = [[shuffled_index(e * count + i, count, seed=7) for i in range(count)] for e in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count >= 64:
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[1] != [shuffled_index(i, count, seed=8) for i in range(count)]  # seeds are not shifted epochs
        assert epochs[0] != [shuffled_index(i, count, seed=7, source=1) for i in range(count)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_has_each_share_to_within_one_row(weights):
    mixture = Mixture([make_rows(10)] * len(weights), weights)
    shares, count = np.asarray(weights) / sum(weights), 250_000
    for start in (0, 777_777):
        which, nth = mixture.locate(np.arange(start, start + count))
        for source, share in enumerate(shares):
            here = which == source
            np.testing.assert_array_equal(nth[here], nth[here][0] + np.arange(here.sum()))
            given = nth[here][0] + np.cumsum(here)
            assert np.abs(given - share * (start + np.arange(1, count + 1))).max() < 1


def test_periods_are_the_smallest_exact_ones():
    assert period_counts((0.69, 0.31)).tolist() == [69, 31]
    assert period_counts((2.0, 4.0, 6.0)).tolist() == [1, 2, 3]
    assert period_counts((1 / 3, 2 / 3)).tolist() == [1, 2]
    assert period_counts((0.693584, 0.306416)).tolist() == [43349, 19151]
    assert period_counts((7.0,)).tolist() == [1]


@pytest.mark.parametrize("k", [2, 3, 5])
def test_interleaving_keeps_the_bound_of_tijdeman(k):
    which, _, counts = interleaving(tuple(float(x) for x in RANDOM.integers(1, 60, k)))
    given = np.cumsum(which[:, None] == np.arange(k), axis=0)
    shares = np.arange(1, len(which) + 1)[:, None] * (counts / counts.sum())
    assert np.abs(given - shares).max() <= 1 - 1 / (2 * k - 2) + 1e-9


def test_each_source_of_a_mixture_has_its_own_epochs():
    mixture = Mixture([make_rows(6), make_rows(4, first=100)], (0.75, 0.25), seed=5)
    stream = first_tokens(mixture[np.arange(16)])
    first, second = [x for x in stream if x < 100], [x for x in stream if x >= 100]
    assert sorted(first[:6]) == sorted(first[6:]) == list(range(6))
    assert sorted(second) == [100, 101, 102, 103]
    assert first_tokens(mixture[np.asarray([11, 3, 3])]) == [stream[11], stream[3], stream[3]]


def test_order_depends_on_the_seed_and_not_on_the_weight():
    index = np.arange(50)
    streams = [first_tokens(Mixture([make_rows(50)], seed=seed)[index]) for seed in range(3)]
    assert all(a != b for a, b in itertools.combinations(streams, 2))
    assert streams[2] == first_tokens(Mixture([make_rows(50)], (0.4,), seed=2)[index])


STEPS, BATCH = (0, 1, 2, 57), 16
PROCESS = textwrap.dedent("""
    import sys
    import jax
    import numpy as np

    port, rank, rows, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 4, rank)
    from tests.data.test_loader import BATCH, FIELDS, STEPS, prepared_loader
    from dlm_jax.parallel import MeshConfig, make_mesh, make_global_batch

    mesh, loader, read_rows = make_mesh(MeshConfig(data=4, fsdp=2)), prepared_loader(rows), set()
    read_batch = loader.batch
    loader.batch = lambda step, part: read_rows.update(range(part.start, part.stop)) or read_batch(step, part)
    found = {}
    for step in STEPS:
        batches = loader.batches(step, lambda read: make_global_batch(read, BATCH, mesh))
        batch = next(batches)
        batches.close()
        for name in FIELDS:
            for shard in getattr(batch, name).addressable_shards:
                found[f"{step}/{name}/{shard.index[0].start or 0}"] = np.asarray(shard.data)
    np.savez(out, read_rows=sorted(read_rows), **found)
""")


def prepared_loader(directory: str) -> Loader:
    manifest = read_manifest(directory)
    sources = [manifest.rows(split) for split in ("train", "validation")]
    return Loader(sources, BATCH, weights=(0.75, 0.25), seed=3, random_length=0.1)


def test_four_processes_read_disjoint_rows_of_the_same_batches(tmp_path, tokenizer):
    text, rows = tmp_path / "text.jsonl", str(tmp_path / "rows")
    text.write_text("".join(json.dumps({"text": f"story number {i} " * (1 + i % 5)}) + "\n" for i in range(400)))
    prepare(open_sources([str(text)]), rows, tokenizer,
            RowsConfig(length=32, packing="document_mask", validation_fraction=0.2))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    processes = [subprocess.Popen([sys.executable, str(script), port, str(rank), rows, str(tmp_path / f"{rank}.npz")],
                                  env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                 for rank in range(4)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    if any(process.returncode for process in processes):
        pytest.fail("\n".join(outputs))
    loader, read_by = prepared_loader(rows), []
    for rank in range(4):
        with np.load(tmp_path / f"{rank}.npz") as found:
            read_by.append(found["read_rows"].tolist())
            for key in set(found) - {"read_rows"}:
                step, name, start = key.split("/")
                expected = getattr(loader.batch(int(step)), name)
                np.testing.assert_array_equal(found[key], expected[int(start) : int(start) + len(found[key])], key)
    assert sorted(itertools.chain.from_iterable(read_by)) == list(range(BATCH))
