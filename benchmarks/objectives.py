"""What each term of the objective is worth: the points of the product at a quarter of the tokens, beside plain runs.

    python benchmarks/objectives.py --base=assets/stories-gpt2 --data assets/stories-text/train.jsonl \\
        --validation assets/stories-text/heldout.jsonl

adapts the base at `--tokens` by each point of the objective, and by the bound alone with more tokens, up to four times
as many, for full diffusion and for blocks. Rows and their order are the same for each seed. It measures the held-out
bound, the AR loss of the adapted model itself and the perplexity of its samples under the parent; for blocks the tokens
per pass when its causal half checks what it drafts (drafter=self), and the bound in parts, by what a masked token sees;
and with --data_dir HellaSwag and LAMBADA by the bound and by the AR loss of the adapted model. It times a step of each
point, in turns. It writes benchmarks/results/objectives-NAME.json and prints the tables. Runs
that are done are not repeated; one that was cut short resumes.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics

import harness
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dlm_jax import DiffusionLM
from dlm_jax.cli.main import main as dlm
from dlm_jax.data.config import DataConfig
from dlm_jax.data.corpus import load_rows
from dlm_jax.diffusion import Batch, ObjectiveConfig, TeacherObjective, noise_batch, token_nll
from dlm_jax.evaluation import autoregressive_nll
from dlm_jax.models import split_trainable
from dlm_jax.random import example_keys
from dlm_jax.sampling import GAP, SamplerConfig, SamplingSpec, SamplingStats, pad_rows, sample
from dlm_jax.storage import write_json
from dlm_jax.training import TrainConfig, read_records, train
from dlm_jax.training.config import CheckpointConfig, LogConfig, ModelSource, ValidationConfig
from dlm_jax.training.optimizer import OptimizerConfig
from dlm_jax.training.state import Frozen, parent_params

# The bound alone with more tokens: 4 x is the full budget; the others are what a step with all terms takes in blocks
# (1.18) and in full diffusion (2.18), and so runs of equal time.
BUDGETS = {f"bound, {times:g} x tokens": times for times in (1.2, 2.2, 4)}
POINTS = {
    "bound": {},
    "+ AR 0.3": {"clean_weight": 0.3},
    "+ distribution": {"teacher": TeacherObjective(distribution_weight=1.0)},
    "+ hidden": {"teacher": TeacherObjective(hidden_weight=10.0)},
    "+ both": {"teacher": TeacherObjective(distribution_weight=1.0, hidden_weight=10.0)},
    "+ AR 0.3 + hidden": {"clean_weight": 0.3, "teacher": TeacherObjective(hidden_weight=10.0)},
    "+ AR 0.3 + both": {"clean_weight": 0.3, "teacher": TeacherObjective(distribution_weight=1.0, hidden_weight=10.0)},
    "+ AR 0.3 + both + position noise": {
        "noise": "position", "clean_weight": 0.3,
        "teacher": TeacherObjective(distribution_weight=1.0, hidden_weight=10.0)},
    "distribution alone": {"noised_weight": 0.0, "teacher": TeacherObjective(distribution_weight=1.0)},
    "+ position noise": {"noise": "position"},
    "+ confidence 0.1": {"confidence_weight": 0.1},
    "all masked + AR 0.2": {"noise": "all_masked", "clean_weight": 0.2},  # I-DLM
    **{name: {} for name in BUDGETS},
}
STRUCTURES = {"full diffusion": 0, "blocks of 4": 4, "blocks of 16": 16}
TASKS = ("hellaswag", "lambada_openai")
CONTEXTS = ("all before it, none after", "not all before it, none after", "a token after it")
METRICS = (("hellaswag", "acc"), ("lambada_openai", "acc"), ("lambada_openai", "perplexity"))


def objective_of(structure: str, point: str, num_steps: int) -> ObjectiveConfig:
    """Returns the objective: attention is annealed over a third of the run, blocks have their size from the start."""
    size = STRUCTURES[structure]
    if size == 0:
        return ObjectiveConfig(anneal_steps=num_steps // 3, **POINTS[point])
    return ObjectiveConfig(name="block_diffusion", block_size=size, **POINTS[point])


def configure(args: argparse.Namespace, structure: str, point: str, seed: int) -> TrainConfig:
    """Returns the config of a run; points differ only in what they are named after."""
    num_steps = int(args.tokens * BUDGETS.get(point, 1)) // (args.batch_size * args.length)
    return TrainConfig(
        seed=seed, num_steps=num_steps,
        model=ModelSource(source=args.base, mask_token=args.mask_token, dtype=args.dtype),
        data=DataConfig(train=tuple(args.data), validation=tuple(args.validation), length=args.length,
                        batch_size=args.batch_size, cache_dir=str(args.work / "data")),
        objective=objective_of(structure, point, num_steps),
        optimizer=OptimizerConfig(learning_rate=args.learning_rate, warmup_steps=num_steps // 20, b2=0.99),
        validation=ValidationConfig(every=num_steps, num_rows=args.validation_rows, num_samples=8),
        checkpoint=CheckpointConfig(every=num_steps, keep=1, keep_best=False),
        log=LogConfig(every=max(1, num_steps // 20), tensorboard=False))


def held_out_rows(lm: DiffusionLM, config: TrainConfig) -> np.ndarray:
    """Returns the rows that a run's bound is measured on, int32 [num_rows, length]."""
    _, rows = load_rows(config.data, lm.tokenizer, vocab_size=lm.model.config.vocab_size,
                        cache_dir=config.data.cache_dir)
    return rows[np.arange(min(len(rows), config.validation.num_rows))].tokens.astype(np.int32)


def own_ar_loss(lm: DiffusionLM, config: TrainConfig) -> float:
    """Returns the AR loss of a model on the held-out rows, nats per token: what it still knows of its parent."""
    tokens = held_out_rows(lm, config)
    return autoregressive_nll(lm.model, tokens, np.ones(tokens.shape, bool)).nats_per_token


def bound_by_context(lm: DiffusionLM, config: TrainConfig, num_samples: int = 16) -> dict[str, float]:
    """Returns the parts of a block model's bound, nats per token, by what a masked token sees of its own block.

    Of what comes before the token it sees all, as the parent does, or not all; or it sees a token after it, which the
    parent does not. The masks are the training's, by rate, not those of the held-out bound.
    """
    tokens = held_out_rows(lm, config)
    noisable = np.broadcast_to(np.arange(tokens.shape[1]) > 0, tokens.shape)
    blocks, (graphdef, params) = lm.diffusion.blocks, nnx.split(lm.model)
    objective = ObjectiveConfig(name="block_diffusion", block_size=blocks.size, clean_attention=blocks.clean_attention)

    @jax.jit
    def sums(params: nnx.State, sample: jax.Array) -> list[jax.Array]:
        (rows, length), model = tokens.shape, nnx.merge(graphdef, params)
        batch = Batch(jnp.asarray(tokens), jnp.asarray(noisable), sample * rows + jnp.arange(rows, dtype=jnp.uint32))
        noisy, mask = noise_batch(objective, batch, sample, seed=0, batch_size=rows,
                                  mask_token_id=lm.diffusion.mask_token_id)
        hidden = model.hidden(noisy.tokens, mask, positions=noisy.positions, noised=noisy.noised)
        nll = noisy.weights * token_nll(hidden, model.unembed, noisy.targets, noisy.loss_mask)
        masked = (noisy.tokens != noisy.targets)[:, :length].reshape(rows, -1, blocks.size)
        gap = jnp.cumsum(masked, axis=2) > masked
        later = jnp.cumsum(~masked[:, :, ::-1], axis=2)[:, :, ::-1] > ~masked
        of_noised, of_clean = nll[:, :length].reshape(masked.shape), nll[:, length:]  # the clean copy: firsts of blocks
        return [of_noised.sum(where=~gap & ~later) + of_clean.sum(), of_noised.sum(where=gap & ~later),
                of_noised.sum(where=later)]

    samples = [sums(params, jnp.uint32(sample)) for sample in range(num_samples)]
    return dict(zip(CONTEXTS, (np.sum(samples, axis=0) / (num_samples * noisable.sum())).tolist(), strict=True))


def sampled_perplexity(lm: DiffusionLM, judge: DiffusionLM, args: argparse.Namespace) -> dict[str, float]:
    """Returns the perplexity under the parent of samples at temperature 1, distinct-2, and passes per text."""
    policy = SamplerConfig("confidence", args.length // 2) if lm.diffusion.blocks is None else SamplerConfig(
        "threshold", threshold=0.5)
    texts = harness.sample_texts(lm, policy, args.length, args.num_samples, 8, 0)
    nats = autoregressive_nll(judge.model, texts["tokens"], np.ones(texts["tokens"].shape, bool)).nats_per_token
    return {"perplexity": float(np.exp(nats)), "distinct_2": harness.distinct(texts["tokens"][:, 1:], 2),
            "forwards": texts["forwards"]}


def self_drafting(lm: DiffusionLM, args: argparse.Namespace) -> dict[str, object]:
    """Returns the tokens per pass, and the acceptance by position, of text that the causal half checks."""
    records = map(json.loads, pathlib.Path(args.validation[0]).read_text(encoding="utf-8").splitlines())
    prompts = [record["text"] for record, _ in zip(records, range(args.num_samples), strict=False)]
    ids = [lm.tokenizer(prompt, add_special_tokens=False)["input_ids"][:16] for prompt in prompts]
    rows = [[lm.pretrained.start_token_id or row[0], *row, *[GAP] * (args.length - 17)] for row in ids]
    batch, stats = pad_rows(rows, args.length), SamplingStats()
    spec = SamplingSpec(SamplerConfig("autoregressive", drafter="self"), lm.pretrained.diffusion)
    keys = example_keys(0, np.arange(len(rows), dtype=np.uint32))
    stats.add(jax.block_until_ready(sample(lm.model, batch.tokens, batch.fixed, batch.lengths, keys, spec)),
              len(rows), 0.0)
    return {"tokens_per_pass": stats.tokens_per_pass, "acceptance": list(map(float, stats.acceptance))}


def tasks(workdir: pathlib.Path, args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Returns the results of a model, by its bound and by its own AR loss, and of its parent: two of each metric."""
    results = {}
    for objective in ("diffusion", "autoregressive"):
        out = workdir / f"tasks-{objective}.json"
        if not out.exists() and dlm(["evaluate", f"--model={workdir}", f"--parent={args.base}", f"--out={out}",
                                     f"--tasks={','.join(TASKS)}", f"--data_dir={args.data_dir}",
                                     f"--limit={args.limit}", f"--num_masks={args.num_masks}",
                                     f"--objective={objective}", f"--dtype={args.dtype}", "--batch_size=32"]):
            raise SystemExit(1)
        found = json.loads(out.read_text())["tasks"]
        results[objective] = {
            f"{task} {name}": [model["mean"] for model in found[task]["metrics"][name]["models"].values()]
            for task, name in METRICS}
    return results


def measure(args: argparse.Namespace, structure: str, point: str, seed: int, judge: DiffusionLM) -> dict:
    """Trains a run unless it is done, and returns its measurements."""
    workdir = args.work / args.name / f"{structure}-{point}-{seed}".replace(" ", "_")
    path, config = workdir / "measured.json", configure(args, structure, point, seed)
    found = json.loads(path.read_text()) if path.exists() else {}
    if not found:
        summary = train(config, workdir)
        if summary["interrupted"]:
            raise SystemExit("interrupted; the same command resumes it")
        found = {"bound": read_records(workdir, "validation")[-1]["bound"], "seconds": summary["seconds"]}
        lm = DiffusionLM.from_pretrained(workdir)
        found |= {"ar_loss": own_ar_loss(lm, config)} | sampled_perplexity(lm, judge, args)
        if STRUCTURES[structure]:
            found |= self_drafting(lm, args) | {"bound_by_context": bound_by_context(lm, config)}
        write_json(path, found)
    if args.data_dir and "tasks" not in found:
        found["tasks"] = tasks(workdir, args)
        write_json(path, found)
    print(f"{structure}, {point}, seed {seed}: bound {found['bound']:.4f}, AR {found['ar_loss']:.4f}, perplexity "
          f"{found['perplexity']:.1f}, tokens per pass {found.get('tokens_per_pass', 1):.2f}", flush=True)
    return found


def step_seconds(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns the median seconds of a step of each point as a ratio to the bound's alone, in turns."""
    lm = DiffusionLM.from_pretrained(args.base, mask_token=args.mask_token, dtype=args.dtype)
    graphdef, params, _ = split_trainable(lm.model)
    params, found = jax.device_get(params), {}
    tokens = harness.random_tokens(lm.model.config.vocab_size, args.batch_size, args.length)
    for structure in args.structures:
        steps = {}
        for point in args.points:
            if point not in BUDGETS:
                objective = dataclasses.replace(objective_of(structure, point, 100), anneal_steps=0)
                frozen = Frozen(split_trainable(lm.model)[2], parent_params(objective, params, lm.model.compute.dtype))
                steps[point] = harness.TrainStep(
                    graphdef, jax.tree.map(jax.numpy.array, params), tokens, objective, OptimizerConfig(),
                    frozen=frozen, mask_token_id=lm.diffusion.mask_token_id, matmul=lm.model.compute.matmul)
        seconds = harness.time_in_turns(steps, args.repeats)
        found[structure] = {point: harness.median_ratio(times, seconds["bound"]) for point, times in seconds.items()}
        found[structure]["seconds of the bound"] = statistics.median(seconds["bound"])
    return found


def mean_and_error(values: list[float]) -> str:
    """Returns the mean, and over several seeds its standard error."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
    return f"{np.mean(values):.3f}" + ("" if error is None else f" ± {error:.3f}")


def print_tables(runs: dict[str, dict[str, list[dict]]], times: dict[str, dict[str, float]]) -> None:
    for structure, points in runs.items():
        tokens_per_pass = ["tokens per pass (drafter=self)"] * (STRUCTURES[structure] > 0)
        print(f"\n{structure}\n")
        print(harness.table_head("objective", "held-out bound", "difference", "own AR loss", "perplexity of samples",
                                 *tokens_per_pass, "time of a step"))
        for point, seeds in points.items():
            values = functools.partial(lambda name, seeds: [run[name] for run in seeds], seeds=seeds)
            paired = [a["bound"] - b["bound"] for a, b in zip(seeds, points.get("bound", ()), strict=False)]
            print(harness.row(point, mean_and_error(values("bound")), mean_and_error(paired) if paired else "",
                              mean_and_error(values("ar_loss")), mean_and_error(values("perplexity")),
                              *([mean_and_error(values("tokens_per_pass"))] if tokens_per_pass else []),
                              f"{times[structure][point]:.2f}" if point in times.get(structure, {}) else ""))
        print_contexts(points)
        print_tasks(points)


def print_contexts(points: dict[str, list[dict]]) -> None:
    """Prints the parts of the bound as differences from the bound's alone, of the seeds that both have."""
    parts = {point: [run["bound_by_context"] for run in seeds if "bound_by_context" in run]
             for point, seeds in points.items()}
    if parts.get("bound"):
        print("\n" + harness.table_head("difference of the bound where a token sees", *CONTEXTS))
        for point, seeds in parts.items():
            if seeds and point != "bound":
                print(harness.row(point, *(mean_and_error([a[name] - b[name] for a, b in
                                                           zip(seeds, parts["bound"], strict=False)])
                                           for name in CONTEXTS)))


def print_tasks(points: dict[str, list[dict]]) -> None:
    """Prints the tasks of the first seed, by the bound and by the AR loss, and of the parent."""
    found = {point: seeds[0]["tasks"] for point, seeds in points.items() if "tasks" in seeds[0]}
    if found:
        names = list(next(iter(found.values()))["diffusion"])
        print("\n" + harness.table_head("objective", *(f"{name}, by the bound / by the AR loss" for name in names)))
        for point, results in found.items():
            print(harness.row(point, *(" / ".join(f"{result[name][0]:.4g}" for result in results.values())
                                       for name in names)))
        results = next(iter(found.values()))["diffusion"]
        print(harness.row("the parent", *(f"{results[name][1]:.4g}" for name in names)))


def main() -> None:
    parser = harness.parser(__doc__, seeds=3, tokens=256_000, batch_size=8, length=128, learning_rate=1.5e-3,
                            validation_rows=64, num_samples=32, repeats=10, limit=100, num_masks=16)
    parser.add_argument("--base", required=True, help="the AR base model: a directory, a GGUF file or a hub id")
    parser.add_argument("--data", nargs="+", required=True, help="paths or globs of text")
    parser.add_argument("--validation", nargs="+", required=True, help="paths of held-out text")
    parser.add_argument("--name", default=None, help="of the results; default: that of the base")
    parser.add_argument("--mask_token", default="<|mask|>", help="default %(default)s")
    parser.add_argument("--dtype", default="auto", help="of activations, default %(default)s")
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES), choices=STRUCTURES)
    parser.add_argument("--points", nargs="+", default=list(POINTS), choices=POINTS)
    parser.add_argument("--data_dir", help="of tasks; none: no tasks")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("objective_runs"))
    args = parser.parse_args()
    args.name = args.name or pathlib.PurePath(args.base).stem
    judge, result = DiffusionLM.from_pretrained(args.base), f"objectives-{args.name}"
    content = harness.read_json(result, {"runs": {}, "step_time_ratios": {}})
    for seed in range(args.seeds):
        for structure in args.structures:
            for point in args.points:
                found = measure(args, structure, point, seed, judge)
                runs = content["runs"].setdefault(structure, {}).setdefault(point, [])
                runs[seed : seed + 1] = [found]
                harness.write_results(result, content | {"settings": harness.settings(args, "work")}, "jax")
    if args.repeats:
        content["step_time_ratios"] |= step_seconds(args)
    harness.write_results(result, content | {"settings": harness.settings(args, "work")}, "jax")
    print_tables(content["runs"], content["step_time_ratios"])


if __name__ == "__main__":
    main()
