import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.diffusion import Batch, DraftObjective, DraftSums, Guesses, drafts, sum_chunks

LENGTH, DRAFTS, VOCAB = 24, 3, 17
OBJECTIVE = DraftObjective(num_anchors=6, decay=4.0, cross_entropy=0.1, kl=0.4, l1=0.9, confidence=1.0)
draft_blocks = jax.jit(drafts.draft_blocks, static_argnums=(0, 2), static_argnames="seed")
draft_losses = jax.jit(drafts.draft_losses, static_argnums=0)


def batch_of(rows=4, first=0, noisable=None, segments=None):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (64, LENGTH)).astype(np.int32)[first : first + rows]
    mask = np.broadcast_to(np.arange(LENGTH) > 0, (rows, LENGTH)) if noisable is None else noisable
    return Batch(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(first, first + rows, dtype=jnp.uint32), segments)


def test_blocks_hold_what_follows_their_anchors():
    batch = batch_of()
    blocks = draft_blocks(OBJECTIVE, batch, DRAFTS, seed=0)
    assert blocks.anchors.shape == (4, 6) and (blocks.anchors > 0).all()
    for row in range(4):
        assert len(set(blocks.anchors[row].tolist())) == 6
        for block, anchor in enumerate(blocks.anchors[row].tolist()):
            known = batch.tokens[row, anchor : anchor + DRAFTS + 1]
            counted = blocks.counted[row, block]
            assert counted.tolist() == [anchor + 1 + k < LENGTH for k in range(DRAFTS)]
            number = int(counted.sum())
            np.testing.assert_array_equal(blocks.labels[row, block, :number], known[1 : number + 1])
            np.testing.assert_array_equal(blocks.previous[row, block, :number], known[:number])
            np.testing.assert_array_equal(blocks.states[row, block, :number], anchor + np.arange(number))


def test_anchors_depend_on_seed_and_example_alone():
    all_rows = draft_blocks(OBJECTIVE, batch_of(8), DRAFTS, seed=0)
    some = draft_blocks(OBJECTIVE, batch_of(3, first=4), DRAFTS, seed=0)
    np.testing.assert_array_equal(all_rows.anchors[4:7], some.anchors)
    assert (draft_blocks(OBJECTIVE, batch_of(8), DRAFTS, seed=1).anchors != all_rows.anchors).any()


def test_each_place_is_as_likely():
    objective = dataclasses.replace(OBJECTIVE, num_anchors=5)
    batch = Batch(jnp.zeros((4000, LENGTH), jnp.int32), jnp.tile(jnp.arange(LENGTH) > 0, (4000, 1)),
                  jnp.arange(4000, dtype=jnp.uint32))
    counts = np.bincount(np.asarray(draft_blocks(objective, batch, DRAFTS, seed=0).anchors).ravel(), minlength=LENGTH)
    assert counts[0] == counts[-1] == 0
    expected = 4000 * 5 / (LENGTH - 2)
    assert np.abs(counts[1:-1] - expected).max() < 5 * np.sqrt(expected)


def test_blocks_end_where_nothing_is_scored_or_another_document_begins():
    noisable = np.zeros((1, LENGTH), bool)
    noisable[0, [4, 5, 6, 7, 10, 12, 13]] = True
    blocks = draft_blocks(OBJECTIVE, batch_of(1, noisable=noisable), DRAFTS, seed=0)
    found = {int(a): c.tolist() for a, c in zip(blocks.anchors[0], blocks.counted[0], strict=True) if c.any()}
    assert found == {4: [True] * 3, 5: [True, True, False], 6: [True, False, False], 12: [True, False, False]}

    segments = jnp.asarray((np.arange(LENGTH) >= 6)[None].astype(np.int32))
    blocks = draft_blocks(dataclasses.replace(OBJECTIVE, num_anchors=LENGTH), batch_of(1, segments=segments), DRAFTS,
                          seed=0)
    found = {int(a): int(c.sum()) for a, c in zip(blocks.anchors[0], blocks.counted[0], strict=True) if c.any()}
    assert 5 not in found and found[4] == 1 and found[3] == 2 and found[6] == 3 and 23 not in found


def random_guesses(seed=0, shape=(2, 5)):
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    logits, target = (2 * jax.random.normal(next(keys), (*shape, DRAFTS, VOCAB)) for _ in range(2))
    labels = jax.random.randint(next(keys), (*shape, DRAFTS), 0, VOCAB)
    counted = jnp.arange(DRAFTS) < jax.random.randint(next(keys), (*shape, 1), 0, DRAFTS + 1)
    return logits, target, labels, counted, jax.random.normal(next(keys), labels.shape)


def test_losses_are_the_published_ones():
    logits, target, labels, counted, log_odds = random_guesses()
    found = draft_losses(OBJECTIVE, Guesses(logits, log_odds), target, labels, counted)
    p, q = (np.asarray(jax.nn.softmax(x, axis=-1), np.float64) for x in (logits, target))
    loss = weight = shared = 0.0
    for index in np.argwhere(np.asarray(counted)):
        i = tuple(index)
        w, l1 = np.exp(-i[-1] / 4.0), np.abs(p[i] - q[i]).sum()
        c = 1 / (1 + np.exp(-float(log_odds[i])))
        accepted = 1 - l1 / 2
        bce = -(accepted * np.log(c) + (1 - accepted) * np.log(1 - c))
        kl = (q[i] * np.log(q[i] / p[i])).sum()
        loss += w * (-0.1 * np.log(p[i][labels[i]]) + 0.4 * kl + 0.9 * l1 + bce)
        weight, shared = weight + w, shared + np.minimum(p[i], q[i]).sum()
    np.testing.assert_allclose(found.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(found.weight, weight, rtol=1e-5)
    np.testing.assert_allclose(found.accepted.sum(), shared, rtol=1e-5)  # sum min(p, q) = 1 - L1 / 2
    np.testing.assert_array_equal(found.counted, counted.sum(axis=(0, 1)))


def test_no_gradient_passes_through_what_the_confidence_learns():
    logits, target, labels, counted, log_odds = random_guesses()
    alone = DraftObjective(cross_entropy=0.0, confidence=1.0)

    def loss(logits, log_odds):
        return draft_losses(alone, Guesses(logits, log_odds), target, labels, counted).loss

    by_logits, by_log_odds = jax.jit(jax.grad(loss, argnums=(0, 1)))(logits, log_odds)
    assert not by_logits.any() and (jnp.abs(by_log_odds) > 0).any()


def test_adaptive_weights():
    """w_k = sum over i >= k of the product of s_j over j <= i, with s = (1 + p(label)) / 2."""
    nll = jnp.array([[0.1, 1.0, 2.0]])
    s = 0.5 * np.exp(-np.asarray(nll[0])) + 0.5
    adaptive = DraftObjective(adaptive=True)
    found = drafts.guess_weights(adaptive, nll, jnp.ones((1, 3), bool))
    np.testing.assert_allclose(found[0], [s[0] + s[0] * s[1] + s.prod(), s[0] * s[1] + s.prod(), s.prod()], rtol=1e-6)
    found = drafts.guess_weights(adaptive, nll, jnp.array([[True, True, False]]))
    np.testing.assert_allclose(found[0, :2], [s[0] + s[0] * s[1], s[0] * s[1]], rtol=1e-6)
    assert not jax.grad(lambda nll: drafts.guess_weights(adaptive, nll, jnp.ones((1, 3), bool)).sum())(nll).any()


def test_selector_learns_where_the_label_is_a_candidate():
    logits, _, labels, counted, _ = random_guesses()
    top, candidates = jax.lax.top_k(logits, 4)
    found = draft_losses(DraftObjective(cross_entropy=0.0, selector=1.0, decay=1e9),
                         Guesses(logits, None, candidates, top), None, labels, counted)
    expected, log_softmax = 0.0, np.asarray(jax.nn.log_softmax(top))
    for index in np.argwhere(np.asarray(counted)):
        i, where = tuple(index), np.flatnonzero(candidates[tuple(index)] == labels[tuple(index)])
        expected -= log_softmax[i][where[0]] if len(where) else 0.0
    assert expected > 0
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)
    assert found.accepted is None


def test_a_perfect_drafter_has_all_guesses_accepted():
    logits, _, labels, _, _ = random_guesses()
    sharp = 100 * jax.nn.one_hot(labels, VOCAB)
    found = draft_losses(OBJECTIVE, Guesses(sharp), sharp, labels, jnp.ones(labels.shape, bool))
    metrics = found.metrics()
    for name in ("tokens_per_pass", "top_tokens_per_pass"):
        np.testing.assert_allclose(metrics[name], DRAFTS + 1, rtol=1e-5)
    np.testing.assert_allclose([metrics[f"acceptance_{k}"] for k in (1, 2, 3)], 1.0, rtol=1e-5)
    assert "acceptance_4" not in metrics and metrics["accuracy"] == 1
    wrong = draft_losses(OBJECTIVE, Guesses(logits), sharp, labels, jnp.ones(labels.shape, bool)).metrics()
    p = np.take_along_axis(np.asarray(jax.nn.softmax(logits)), np.asarray(labels)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(wrong["tokens_per_pass"], 1 + np.cumprod(p, axis=-1).sum(axis=-1).mean(), rtol=1e-5)


@pytest.mark.parametrize("guesses", [3, 6, 128])
def test_chunks_change_nothing(guesses, monkeypatch):
    """One block at a time, two (the last alone), and all: the sums and the gradients of the head at once."""
    monkeypatch.setattr(drafts, "CHUNK_GUESSES", guesses)
    _, _, labels, counted, log_odds = random_guesses()
    counted = counted.at[:, 2].set(False)  # a chunk without any
    table, head = (jax.random.normal(jax.random.key(i), (8, VOCAB)) for i in (1, 2))
    states, target = (jax.random.normal(jax.random.key(i), (2, 5, DRAFTS, 8)) for i in (3, 4))

    def function(table, moving, head, fixed):
        guesses = Guesses(moving[0] @ head + moving[0] @ table, moving[1])
        return draft_losses(OBJECTIVE, guesses, fixed["target"] @ head, fixed["labels"], fixed["counted"])

    fixed = {"labels": labels, "counted": counted, "target": target}
    zero = functools.partial(DraftSums.zero, DRAFTS, target=True)

    def at_once(table, moving):
        sums = function(table, moving, head, fixed)
        return 3 * sums.loss, sums

    def in_chunks(table, moving):
        sums = sum_chunks(function, zero, table, moving, head, fixed)
        return 3 * sums.loss, sums

    expected, found = (jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(table, (states, log_odds))
                       for f in (at_once, in_chunks))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    without = jax.jit(lambda *args: sum_chunks(function, zero, *args))(table, (states, log_odds), head, fixed)
    np.testing.assert_allclose(without.loss, expected[0][1].loss, rtol=1e-5)
