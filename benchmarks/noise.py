"""What the noise costs: the variance of the training loss, its gradient and the bound under different samples of it.

    python benchmarks/noise.py --model=WORKDIR --data=heldout.jsonl        an adapted model; minutes on two cores

Everything but the noise is fixed: the model, the rows, the number of forward passes, the weights 1 / t of the bound.

`loss`: one global batch, noised many times. `the reference` samples as its training script does: every device starts
with the same seed, so the rows of 8 devices share 1/8 as many times and noises. `its own loss` divides by the number of
masked tokens, whose mean is another, so that only errors relative to the mean compare. The gradient's error is the
root of the summed variances of its entries, in units of the length of the mean gradient.

`bound`: rows of held-out text, each with its own estimate from so many passes. Writes benchmarks/results/noise.json.
"""

import tempfile
from collections.abc import Callable

import harness
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from dlm_jax import DiffusionLM
from dlm_jax.attention import AttentionMask
from dlm_jax.data.config import DataConfig
from dlm_jax.data.corpus import load_rows
from dlm_jax.diffusion import HeadPlan, corrupt, loss_sums, sample_times
from dlm_jax.evaluation.eval_model import Pair
from dlm_jax.evaluation.scoring import MaskSample, bound_masks, diffusion_score, time_masks

DEVICES, LOW = 8, 1e-3


def reference(key: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Returns (times, keys) of a batch over devices that all start with one seed."""
    times, keys = independent(key, rows // DEVICES)
    return jnp.tile(times, DEVICES), jnp.tile(keys, DEVICES)


def independent(key: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    first, second = jax.random.split(key)
    return jax.random.uniform(first, (rows,), minval=LOW), jax.random.split(second, rows)


def stratified(key: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """dlm_jax's."""
    first, second = jax.random.split(key)
    seed = jax.random.randint(first, (), 0, 2**31 - 1)
    return sample_times(seed, 0, jnp.arange(rows), rows, low=LOW), jax.random.split(second, rows)


DRAWS = {"the reference": (reference, "all_tokens"), "the reference, its own loss": (reference, "masked_tokens"),
         "independent times": (independent, "all_tokens"), "stratified times (ours)": (stratified, "all_tokens")}


def of_loss(lm: DiffusionLM, tokens: np.ndarray, num_draws: int) -> dict[str, dict[str, float]]:
    """Of one batch [rows, length]."""
    graphdef, params = nnx.split(lm.model)
    plan = HeadPlan(vocab_axis=0 if lm.model.head is None else 1)
    noisable_mask = jnp.ones(tokens.shape, bool).at[:, 0].set(False)

    def loss(params: nnx.State, times: jax.Array, keys: jax.Array, normalizer: str) -> jax.Array:
        model = nnx.merge(graphdef, params)
        batch = corrupt(jnp.asarray(tokens), noisable_mask, times, keys, mask_token_id=lm.mask_token_id)
        hidden = model.hidden(batch.tokens, AttentionMask.bidirectional())
        sums = loss_sums(hidden, model.head_kernel[...], plan, batch, shift=lm.pretrained.diffusion.shift)
        return sums.loss / sums.normalizer(normalizer)

    result = {}
    for name, (draw, normalizer) in DRAWS.items():
        step = jax.jit(lambda params, key, draw=draw, normalizer=normalizer: jax.value_and_grad(loss)(
            params, *draw(key, len(tokens)), normalizer))
        losses, total, square = [], None, 0.0
        for key in tqdm(jax.random.split(jax.random.key(0), num_draws), desc=name, leave=False, disable=None):
            value, gradient = step(params, key)
            flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)]).astype(np.float64)
            losses.append(float(value))
            total = flat if total is None else total + flat
            square += float(flat @ flat)
        mean = total / num_draws
        variance = (square - num_draws * float(mean @ mean)) / (num_draws - 1)
        length = max(float(mean @ mean) - variance / num_draws, 0.0)  # without the noise that is left in the mean
        result[name] = {"mean": float(np.mean(losses)), "gradient_error": (variance / length) ** 0.5,
                        "relative_error": float(np.std(losses, ddof=1) / np.mean(losses))}
    return result


def from_times(length: int, times: np.ndarray, rng: np.random.Generator) -> list[MaskSample]:
    """Independent masks at given rates, each pass with weight 1 / rate."""
    masked = rng.random((len(times), length)) < times[:, None]
    some = masked.any(axis=1)
    return [MaskSample(masked[some], 1 / (len(times) * times[some]))]


def from_counts(length: int, fractions: np.ndarray, rng: np.random.Generator) -> list[MaskSample]:
    """l tokens of each pass, l the given fraction of 1 .. length; weight length / l."""
    number = np.minimum(1 + np.floor(fractions * length).astype(int), length)
    order = np.argsort(rng.random((len(number), length)), axis=1)
    return [MaskSample(order < number[:, None], length / number / len(number))]


RULES: dict[str, Callable[[int, int, int, int], list[MaskSample]]] = {
    "independent times": lambda length, passes, seed, row: from_times(
        length, (rng := np.random.default_rng([seed, row])).random(passes), rng),
    "the reference's evaluation, a grid of times": lambda length, passes, seed, row: from_times(
        length, (np.arange(passes) + 1) / passes, np.random.default_rng([seed, row])),
    "stratified times (tasks, --mc_estimator=time)": lambda length, passes, seed, row: time_masks(
        length, passes, seed, row),
    "exact numbers": lambda length, passes, seed, row: from_counts(
        length, (rng := np.random.default_rng([seed, row])).random(passes), rng),
    "exact numbers, stratified (dlm evaluate --data)": lambda length, passes, seed, row: from_counts(
        length, (np.arange(passes) + (rng := np.random.default_rng([seed, row])).random(passes)) / passes, rng),
    "exact numbers, each token counting equally (tasks)": lambda length, passes, seed, row: bound_masks(
        length, passes, seed, row),
}


def of_bound(lm: DiffusionLM, tokens: np.ndarray, num_draws: int, passes: int) -> dict[str, dict[str, float]]:
    """Of each row by itself, nats a token."""
    length = tokens.shape[1] - 1
    pairs = [Pair((int(row[0]),), tuple(map(int, row[1:])), number) for number, row in enumerate(tokens)]
    result = {}
    for name, rule in RULES.items():
        found = np.stack([diffusion_score(
            lm.model, lambda pair, seed=seed, rule=rule: rule(length, passes, seed, pair.item),
            diffusion=lm.diffusion, batch_size=32)(pairs).mean(axis=1) / length
            for seed in tqdm(range(num_draws), desc=name, leave=False, disable=None)])  # [draws, rows]
        variance = found.var(axis=0, ddof=1).mean()
        result[name] = {"mean": float(found.mean()), "error": float(variance**0.5),
                        "error_of_mean": float((variance / found.size) ** 0.5)}
    first = result["independent times"]["error"]
    return {name: row | {"passes_for_equal_error": passes * (row["error"] / first) ** 2}
            for name, row in result.items()}


def main() -> None:
    parser = harness.parser(__doc__, length=128, batch_size=32, rows=32, passes=16, draws=100)
    parser.add_argument("--model", required=True, help="a diffusion model")
    parser.add_argument("--data", required=True, help="text")
    args = parser.parse_args()
    if args.batch_size % DEVICES:
        parser.error(f"--batch_size must be a multiple of {DEVICES}")
    lm = DiffusionLM.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(train=(args.data,), validation_fraction=0.0, length=args.length)
        (rows,), _ = load_rows(data, lm.tokenizer, vocab_size=lm.config.vocab_size, cache_dir=folder)
        tokens = rows[slice(max(args.batch_size, args.rows))].tokens.astype(np.int32)
    loss = of_loss(lm, tokens[: args.batch_size], args.draws)
    print(f"loss of {args.batch_size} x {args.length} tokens, {args.draws} draws\n\n"
          "| draws | mean | error of the loss, relative | error of the gradient, relative |\n| --- | --- | --- | --- |")
    for name, row in loss.items():
        print(f"| {name} | {row['mean']:.3f} | {row['relative_error']:.4f} | {row['gradient_error']:.3f} |")
    bound = of_bound(lm, tokens[: args.rows], args.draws // 4, args.passes)
    print(f"\nbound of {args.rows} rows of {args.length} tokens, {args.passes} passes a row, {args.draws // 4} draws\n"
          "\n| draws | mean, nats a token | error of a row | passes for the error of the first |\n"
          "| --- | --- | --- | --- |")
    for name, row in bound.items():
        print(f"| {name} | {row['mean']:.4f} ± {row['error_of_mean']:.4f} | {row['error']:.4f} | "
              f"{row['passes_for_equal_error']:.1f} |")
    harness.write_results("noise", {"settings": harness.settings(args, "model", "data"), "loss": loss, "bound": bound},
                          "jax", "flax", "numpy")


if __name__ == "__main__":
    main()
