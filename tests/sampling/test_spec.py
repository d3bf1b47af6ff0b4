import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.sampling import SamplerConfig
from dlm_jax.sampling.spec import block_ids, block_steps, next_reveal, num_revealed, planned_step

STEP_SCHEDULES = ("linear", "cosine")
every_schedule = pytest.mark.parametrize("step_schedule", STEP_SCHEDULES)


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 7, 16, 64, 1000])
def test_each_step_reveals_at_least_one_until_all_are_filled(step_schedule, steps):
    number, step = np.arange(1, 80)[:, None], np.arange(82)
    filled = np.asarray(num_revealed(SamplerConfig(step_schedule=step_schedule), step, number, steps))
    taken = np.minimum(number, steps)  # a row with fewer gaps than steps is done early
    assert (filled[:, 0] == 0).all()
    for row, n, last in zip(filled, number[:, 0], taken[:, 0], strict=True):
        assert (np.diff(row[: last + 1]) >= 1).all()
        assert (row[last:] == n).all()
        assert row.max() == n


def test_linear_is_even_and_cosine_follows_cosine():
    number, steps = np.arange(1, 200)[:, None], np.array([1, 3, 10])
    for taken in steps:
        step = np.arange(taken + 1)
        linear, cosine = (np.asarray(num_revealed(SamplerConfig(step_schedule=schedule), step, number, taken))
                          for schedule in STEP_SCHEDULES)
        many = number[:, 0] >= taken
        assert (np.ptp(np.diff(linear[many]), axis=1) <= 1).all()
        plenty = number[:, 0] >= 8 * taken**2  # where one per step is no constraint
        expected = number * (1 - np.cos(np.pi / 2 * step / taken))
        assert (np.abs(cosine - expected)[plenty] < 1).all()
        assert (np.diff(cosine[plenty], 2) >= -1).all()  # few at first and many at the end


@every_schedule
def test_planned_step_follows_schedule(step_schedule):
    """The linear schedule has the law of the DiffuLLaMA reference implementation's loop."""
    steps, uniform = 7, (np.arange(70_000) + 0.5) / 70_000
    plan = np.asarray(planned_step(SamplerConfig(step_schedule=step_schedule), jnp.asarray(uniform), jnp.int32(steps)))
    assert (np.diff(plan) >= 0).all() and plan.min() == 0 and plan.max() == steps - 1
    share = np.bincount(plan) / len(plan)
    if step_schedule == "cosine":
        np.testing.assert_allclose(share, -np.diff(np.cos(np.pi / 2 * np.arange(steps + 1) / steps)), atol=1e-3)
        return
    masked, law = 1.0, []
    for t in range(steps - 1, -1, -1):  # a masked token is revealed with probability 1/(t+1)
        law.append(masked / (t + 1))
        masked -= law[-1]
    np.testing.assert_allclose(share, law, atol=1e-3)


@every_schedule
def test_planned_step_is_in_range(step_schedule):
    for steps in (1, 3, 10_000):
        edge = jnp.array([0.0, np.nextafter(np.float32(1), np.float32(0))], jnp.float32)
        first, last = planned_step(SamplerConfig(step_schedule=step_schedule), edge, jnp.int32(steps))
        assert first == 0 and last == steps - 1


def test_block_ids_are_windows_from_left_to_right():
    rng = np.random.default_rng(0)
    for chance, block_length in ((0.5, 4), (0.9, 1), (0.3, 100)):
        gaps = rng.random((6, 50)) < chance
        gaps[5] = False
        blocks = np.asarray(block_ids(jnp.asarray(gaps), block_length))
        for row, here in zip(blocks, gaps, strict=True):
            found, where = row[here], np.flatnonzero(here)
            assert (np.diff(found) >= 0).all()
            assert set(found) == set(range(len(set(found))))  # 0, 1, 2, ... without a hole
            starts = [where[found == block].min() for block in set(found)]
            for block, start in zip(sorted(set(found)), sorted(starts), strict=True):
                assert where[found == block].max() < start + block_length
                later = where[found > block]
                assert not len(later) or later.min() >= start + block_length  # a window has all gaps in its range


def test_one_block_without_block_length():
    assert (block_ids(jnp.ones((2, 5), bool), None) == 0).all()


def steps_of_blocks(numbers, num_steps):
    """Returns the steps of blocks with so many gaps each."""
    blocks = np.full((12, 160), -1)  # of one shape, so that little is compiled: row n asks for block n
    blocks[:, : sum(numbers)] = np.repeat(np.arange(len(numbers)), numbers)
    steps = block_steps(num_steps, blocks >= 0, blocks, np.arange(12))
    return np.asarray(steps)[: len(numbers)]


def test_block_steps_are_proportional_to_gaps():
    assert steps_of_blocks([8, 8, 8, 8], 8).tolist() == [2, 2, 2, 2]
    assert steps_of_blocks([31, 11], 10).tolist() == [7, 3]
    assert steps_of_blocks([1, 9], 2).tolist() == [1, 1] and steps_of_blocks([9, 1], 3).tolist() == [2, 1]
    assert steps_of_blocks([8, 8, 4], 5).tolist() == [2, 2, 1] and steps_of_blocks([1, 1, 9], 4).tolist() == [1, 1, 2]
    rng = np.random.default_rng(1)
    for _ in range(100):
        blocks, num_steps = rng.integers(1, 12), int(rng.integers(1, 100))
        even = steps_of_blocks(np.full(blocks, 8), num_steps)
        assert even.min() >= 1 and even.sum() == max(num_steps, blocks) and np.ptp(even) <= 1
        uneven = rng.integers(1, 12, blocks)
        uneven[0] = max(uneven[0], 2)
        found = steps_of_blocks(uneven, num_steps)
        assert found.min() >= 1 and found.sum() == max(num_steps, blocks)
        if num_steps <= uneven.sum():
            assert (found <= uneven).all()  # a step has something to reveal
        share = uneven * num_steps / uneven.sum()
        if share.min() >= 1:
            assert (np.abs(found - share) < 1).all()


def test_block_steps_per_row():
    gaps = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], bool)
    blocks = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    found = [np.asarray(block_steps(4, gaps, blocks, block)) for block in range(2)]
    assert found[0][:2].tolist() == [2, 4] and found[1][0] == 2
    assert (np.array(found) >= 1).all()


def test_block_steps_without_num_steps():
    assert SamplerConfig("first_hitting").steps is None and SamplerConfig("threshold").steps is None
    blocks = np.array([[0, 0, 0, 0, 1]])
    np.testing.assert_array_equal([block_steps(None, blocks >= 0, blocks, n)[0] for n in range(2)], [4, 1])
    assert SamplerConfig("confidence").steps == 64


@pytest.mark.parametrize("steps", [1, 2, 7, 24, 64, 512])
def test_dream_schedule_is_that_of_its_loop(steps):
    """The steps that reveal something, and how much, of Dream's loop over float32 times."""
    times = np.linspace(1, 1e-3, steps + 1, dtype=np.float32)
    for number in (1, 5, 24, 128):
        left, expected = number, []
        for step in range(steps):
            count = left if step == steps - 1 else int(np.float32(left) * (1 - times[step + 1] / times[step]))
            left -= count
            expected += [(step, number - left)] * (count > 0)
        found, step, filled = [], jnp.array([0]), jnp.array([0])
        while filled[0] < number:
            step, filled = next_reveal(SamplerConfig(num_steps=steps, step_schedule="dream"), step, jnp.array([number]),
                                       filled, jnp.array([steps]))
            found.append((int(step[0]), int(filled[0])))
            step += 1
        assert found == expected
