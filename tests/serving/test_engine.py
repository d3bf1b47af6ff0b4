"""The engine: its texts are those of `sample`, whoever else is served; rows join, leave, fail and wait in order."""

import contextlib
import functools
import threading
import time
import types

import jax
import numpy as np
import pytest

from dlm_jax.diffusion import BlockSpec
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.parallel import MeshConfig, make_mesh
from dlm_jax.random import example_keys
from dlm_jax.sampling import GAP, sample_rows
from dlm_jax.serving.engine import Engine, EngineStopped
from dlm_jax.serving.queue import Job, QueueFull
from dlm_jax.serving.running_batch import Programs, RunningBatch
from tests.sampling.tiny_models import EOS, make_spec, tiny

BLOCKS = BlockSpec(4)
KINDS = {
    "full diffusion": (None, dict(policy="confidence", num_steps=9, temperature=0.8)),
    "blocks of positions": (None, dict(policy="random_exact", num_steps=12, block_length=5, remask=0.2)),
    "stale cache": (None, dict(policy="confidence", num_steps=12, block_length=8, cache="dual")),
    "guidance": (None, dict(policy="margin", num_steps=6, cfg_scale=0.5, repetition_penalty=1.2, top_k=9)),
    "block model": (BLOCKS, dict(policy="threshold", threshold=0.3, top_p=0.9)),
    "autoregressive": (None, dict(policy="autoregressive", eos_penalty=0.5)),
    "ngram": (None, dict(policy="autoregressive", drafter="ngram", num_drafts=3)),
    "self": (BLOCKS, dict(policy="autoregressive", drafter="self")),
}


@functools.cache
def language_model(**changes):
    """Returns what the engine needs of a `DiffusionLM`."""
    network = tiny("llama", **changes)
    return types.SimpleNamespace(config=network.config, mesh=None, model_with_drafter=lambda name: network)


class Client:
    """Collects the updates of jobs and checks that they are in order."""

    def __init__(self, engine):
        self.engine, self.updates, self._done = engine, [], []

    def submit(self, rows, blocks=None, seed=0, first_index=0, model="m", every_step=False, stop=True, **settings):
        jobs = []
        spec = make_spec(blocks=blocks, eos=EOS, stop=stop, **settings)
        for index, row in enumerate(rows, first_index):
            updates, done = [], threading.Event()
            self.updates.append((list(row), updates))
            self._done.append(done)

            def receive(update, updates=updates, done=done):
                assert not done.is_set()
                updates.append(update)
                if update.is_last:
                    done.set()

            jobs.append(Job(model, row, spec, receive, seed, index, every_step))
        return self.engine.submit(jobs)

    def wait(self):
        """Returns the rows as they end, GAP where nothing was needed after the end of the text."""
        for done in self._done:
            assert done.wait(120)
        return [self.result(row, updates) for row, updates in self.updates]

    @staticmethod
    def result(row, updates):
        row = list(row)
        assert [update.step for update in updates] == sorted(update.step for update in updates)
        for update in updates:
            assert update.error is None, update.error
            for change in update.changes:
                assert change.step == update.step and (change.token, row[change.position]) != (GAP, GAP)
                row[change.position] = change.token
        return row


def rows_of(count, seed=0, inside=False):
    """Returns rows of different lengths up to 32, one program's, with gaps at the end or also in the middle."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        row = rng.integers(0, EOS, rng.integers(1, 12)).tolist() + [GAP] * int(rng.integers(3, 18))
        if inside:
            row += rng.integers(0, EOS, 4).tolist()
        rows.append(row)
    return rows


def expected_rows(rows, blocks, seed=0, first_index=0, stop=True, network=None, **settings):
    spec = make_spec(blocks=blocks, eos=EOS, stop=stop, **settings)
    keys = example_keys(np.uint32(seed), np.arange(first_index, first_index + len(rows), dtype=np.uint32))
    return [row.tolist() for row in sample_rows(network or tiny("llama"), rows, keys, spec, batch_size=3)]


def filled(rows):
    return [[EOS if token == GAP else token for token in row] for row in rows]


@contextlib.contextmanager
def running(models=None, **settings):
    engine = Engine(models or {"m": language_model()}, **settings)
    engine.start()
    yield engine
    engine.stop(drain=False)


@pytest.fixture(scope="module")
def engine():
    """One engine for most tests, which share its compiled programs."""
    with running(max_batch=4, max_queue=40) as engine:
        yield engine


@pytest.fixture
def counts(engine):
    """Returns a function that gives the engine's counts since the start of the test."""
    before = engine.metrics()
    return lambda name: getattr(engine.metrics(), name) - getattr(before, name)


@pytest.mark.parametrize("name", KINDS)
def test_texts_are_those_of_sample(name, engine, counts):
    """Seven rows in at most four slots, so that rows join others that have begun, of three requests."""
    blocks, settings = KINDS[name]
    inside = blocks is None and settings["policy"] != "autoregressive"
    rows, client = rows_of(7, inside=inside), Client(engine)
    client.submit(rows[:3], blocks, seed=5, stop=not inside, **settings)
    client.submit(rows[3:4], blocks, seed=5, first_index=3, every_step=True, stop=not inside, **settings)
    client.submit(rows[4:], blocks, seed=5, first_index=4, stop=not inside, **settings)
    assert filled(client.wait()) == expected_rows(rows, blocks, seed=5, stop=not inside, **settings)
    assert counts("completed") == 7 and engine.metrics().active == engine.metrics().queued == 0 and counts("kinds") <= 1


@pytest.mark.parametrize("name", ["block model", "autoregressive"])
def test_long_prompts_are_computed_in_chunks_between_steps(name):
    """Of two rows that run and two with long prompts, all end as they should, and the first two go on meanwhile."""
    blocks, settings = KINDS[name]
    rng, shapes = np.random.default_rng(0), ((3, 200), (2, 180), (140, 9), (190, 6))
    rows = [rng.integers(0, EOS, given).tolist() + [GAP] * gaps for given, gaps in shapes]
    with running({"m": language_model(max_length=256)}, max_batch=4) as engine:
        short, long = Client(engine), Client(engine)
        tickets = short.submit(rows[:2], blocks, every_step=True, stop=False, **settings)
        while not short.updates[0][1]:
            time.sleep(0.01)
        long.submit(rows[2:], blocks, first_index=2, stop=False, **settings)
        expected = expected_rows(rows[2:], blocks, first_index=2, stop=False, network=tiny("llama", max_length=256),
                                 **settings)
        assert long.wait() == expected
        for ticket in tickets:
            ticket.cancel()


def test_rows_with_other_numbers_share_a_batch(engine, counts):
    rows, client = rows_of(6), Client(engine)
    numbers = [dict(temperature=0.0), dict(temperature=0.7), dict(top_p=0.8), dict(top_k=5),
               dict(threshold=0.1), dict(threshold=0.6, top_p=0.5)]
    for row, settings in zip(rows, numbers, strict=True):
        client.submit([row], BLOCKS, policy="threshold", **settings)
    found = filled(client.wait())
    assert found == [expected_rows([row], BLOCKS, policy="threshold", **settings)[0]
                     for row, settings in zip(rows, numbers, strict=True)]
    assert counts("kinds") <= 1


def test_every_step_has_an_update(engine):
    client = Client(engine)
    client.submit([[1, 2] + [GAP] * 12], every_step=True, stop=False, policy="confidence", num_steps=12)
    client.wait()
    updates = client.updates[0][1]
    assert [update.step for update in updates] == list(range(1, 13))
    assert [len(update.changes) for update in updates] == [1] * 12


def test_cancelled_row_gets_no_update_and_frees_its_slot(engine, counts):
    client, other, began = Client(engine), Client(engine), threading.Event()
    spec = make_spec(policy="first_hitting")
    seen = []

    def receive(update):
        seen.append(update)
        began.set()

    tickets = engine.submit([Job("m", [1] + [GAP] * 127, spec, receive, every_step=True) for _ in range(4)])
    assert began.wait(60)
    for ticket in tickets:
        ticket.cancel()
        ticket.cancel()
    other.submit([[1, 2, GAP, GAP]], policy="first_hitting")
    client.submit(rows_of(2), policy="first_hitting")
    other.wait(), client.wait()
    assert not any(update.is_last for update in seen) and counts("cancelled") == 4
    number = len(seen)
    client.submit(rows_of(1), policy="first_hitting")
    client.wait()
    assert len(seen) == number


@pytest.mark.parametrize("name", ["stale cache", "ngram"])
def test_rows_removed_before_they_have_a_slot(name):
    """Of rows that start together, one leaves before the first step, and the other is as without it."""
    blocks, settings = KINDS[name]
    engine, rows = Engine({"m": language_model()}, max_batch=2), rows_of(2)
    spec = make_spec(blocks=blocks, eos=EOS, stop=True, **settings)
    prepared = [engine._prepare(Job("m", row, spec, print, example_index=index)) for index, row in enumerate(rows)]
    batch = RunningBatch(Programs(tiny("llama"), prepared[0][1], 2))
    batch.add([row for row, _ in prepared], ["first", "second"])
    batch.remove(["first"])
    assert batch.all_owners() == ["second"] and batch.num_rows == 1
    while batch.num_running == 0:
        batch.prefill()
    found = batch.run(100)
    assert list(found) == ["second"] and found["second"].is_done and batch.num_rows == 0
    view, expected = found["second"], expected_rows(rows, blocks, **settings)[1]
    assert np.where(view.masked, EOS, view.tokens)[: len(expected)].tolist() == expected


@pytest.mark.parametrize("max_batch", [1, 4])
def test_a_request_of_many_rows_does_not_keep_others_waiting(max_batch):
    """A second request gets a slot as soon as a row of the first is done, not after its 24."""
    order = []
    spec = make_spec(policy="first_hitting")

    def job(name, length):
        done = threading.Event()

        def receive(update):
            if update.is_last:
                order.append(name)
                done.set()
        return Job("m", [1] + [GAP] * length, spec, receive), done

    with running(max_batch=max_batch) as engine:
        client = Client(engine)
        client.submit(rows_of(4), policy="first_hitting")  # compiles
        client.wait()
        many = [job("many", 40) for _ in range(24)]
        few = [job("few", 20) for _ in range(2)]
        engine.submit([one for one, _ in many])
        engine.submit([one for one, _ in few])
        for _, done in many + few:
            assert done.wait(120)
    assert max(index for index, name in enumerate(order) if name == "few") < 12


def test_full_queue_takes_all_rows_of_a_request_or_none(engine, counts):
    client = Client(engine)
    with pytest.raises(QueueFull):
        client.submit(rows_of(41), policy="first_hitting")
    assert counts("refused") == 41
    again = Client(engine)
    again.submit(rows_of(40), policy="first_hitting")
    again.wait()


@pytest.mark.parametrize("row, settings, error", [
    ([1] * 5, dict(), DataError), ([GAP] * 5, dict(), DataError), ([1, *[GAP] * 128], dict(), DataError),
    ([1, GAP, 2], dict(policy="autoregressive"), ConfigError),
    ([1, *[GAP] * 9], dict(policy="first_hitting", num_steps=3), ConfigError)])
def test_what_cannot_be_sampled_is_refused_at_once(row, settings, error, engine, counts):
    with pytest.raises(error):
        Client(engine).submit([row], **settings)
    assert counts("kinds") == 0


def test_failure_ends_its_rows_and_nothing_else(engine, counts, monkeypatch):
    from dlm_jax.serving import running_batch

    client, failed = Client(engine), Client(engine)
    client.submit([[1] + [GAP] * 12], policy="first_hitting")
    client.wait()
    add, calls = running_batch.RunningBatch.add, []

    def fail_once(self, *args):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return add(self, *args)

    monkeypatch.setattr(running_batch.RunningBatch, "add", fail_once)
    failed.submit([[1] + [GAP] * 12], policy="first_hitting")
    failed._done[0].wait(60)
    assert failed.updates[0][1][-1].error
    client.submit([[1] + [GAP] * 12], policy="first_hitting")
    client.wait()
    assert counts("failed") == 1


def test_kinds_that_are_not_used_are_forgotten(monkeypatch):
    from dlm_jax.serving import engine as module

    monkeypatch.setattr(module, "_MOST_KINDS", 1)
    with running(max_batch=1) as engine:
        for policy in ("first_hitting", "threshold"):
            client = Client(engine)
            client.submit([[1, GAP, GAP]], policy=policy)
            client.wait()
            assert engine.metrics().kinds == 1


def test_calls_run_between_steps(engine):
    assert engine.call(lambda: threading.current_thread().name).result(60) == "engine"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0).result(60)


def test_stop_finishes_or_refuses():
    for drain in (True, False):
        engine = Engine({"m": language_model()}, max_batch=1)
        engine.start()
        client = Client(engine)
        client.submit([[1] + [GAP] * 100] * 3, policy="first_hitting", every_step=True)
        engine.stop(drain=drain)
        for (_, updates), done in zip(client.updates, client._done, strict=True):
            assert done.is_set() and (updates[-1].error is None) == drain
        with pytest.raises(EngineStopped):
            client.submit([[1, GAP]], policy="first_hitting")
        with pytest.raises(EngineStopped):
            engine.call(int)


def test_warm_rows_compile_nothing():
    cold = Engine({"m": language_model()}, max_batch=4)
    spec = make_spec(policy="threshold", blocks=BLOCKS, eos=EOS, stop=True)
    seen = []
    cold.warm_up([Job("m", [1] + [GAP] * 40, spec, print)], lambda *counts: seen.append(counts))
    assert seen == [(0, 1), (1, 1)]
    cold.start()
    client = Client(cold)
    with jax.log_compiles(False), jax.transfer_guard("allow"):
        before = sum(program._cache_size() for program in programs(cold))
        for row in rows_of(9):
            client.submit([row[:2] + [GAP] * 40], BLOCKS, policy="threshold", temperature=0.5)
        client.wait()
        assert sum(program._cache_size() for program in programs(cold)) == before
    cold.stop()


def programs(engine):
    for kind in engine._kinds.values():
        compiled = kind.programs
        yield from (compiled._start.program("default"), compiled._prefill.program("default"),
                    compiled._advance.program("default"), compiled._insert, compiled._select)


def test_mesh_of_eight_devices_gives_the_same_texts():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    with running({"m": types.SimpleNamespace(**vars(language_model()) | {"mesh": mesh})}, max_batch=8) as engine:
        rows, client = rows_of(12), Client(engine)
        client.submit(rows[:5], BLOCKS, policy="threshold")
        client.submit(rows[5:], BLOCKS, first_index=5, policy="threshold")
        assert filled(client.wait()) == expected_rows(rows, BLOCKS, policy="threshold")
