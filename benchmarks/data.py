"""How fast text becomes rows, and rows become batches.

    python benchmarks/data.py --tokenizer=DIR --data 'text/*.jsonl'

compares `dlm prepare` with a plain loop over the same files and tokenizer (`tokenizers.encode_batch_fast`, without
reading and writing), in tokens per second of CPU time, so that the number of cores does not matter. It also measures
the tokens per second that the loader gives on one core, shuffled, at several row lengths and packings. Writes
benchmarks/results/data.json.
"""

import json
import os
import platform
import resource
import shutil
import tempfile
import time

import harness

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for the plain loop; workers use one each anyway

TARGET = 20 * 500_000  # twenty times the estimated consumption of GPT-2 small on an H200, tokens per second
LOADERS = ((512, "concat", False), (1024, "concat", False), (2048, "concat", False), (512, "document_mask", False),
           (512, "concat", True))  # length, packing, mixture


def cpu_seconds() -> float:
    """Returns the CPU time of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def plain_loop(files: list[str], tokenizer) -> tuple[int, float]:
    """Returns (tokens, CPU seconds) of the shortest program that tokenizes these files."""
    from dlm_jax.data.sources import open_sources

    texts = [json.loads(line)["text"] for source in open_sources(files) for line in source.records()]
    backend, tokens, start = tokenizer.backend_tokenizer, 0, cpu_seconds()
    for first in range(0, len(texts), 1000):
        encodings = backend.encode_batch_fast(texts[first : first + 1000], add_special_tokens=False)
        tokens += sum(len(encoding.ids) for encoding in encodings)
    return tokens, cpu_seconds() - start


def measure_prepare(files: list[str], tokenizer, workers: int) -> dict[str, float]:
    """Returns tokens, CPU seconds and seconds of a `prepare`, including the start of its workers."""
    from dlm_jax.data.config import RowsConfig
    from dlm_jax.data.prepare import prepare
    from dlm_jax.data.sources import open_sources

    with tempfile.TemporaryDirectory() as folder:
        cpu, start = cpu_seconds(), time.perf_counter()
        manifest = prepare(open_sources(files), f"{folder}/rows", tokenizer, RowsConfig(validation_fraction=0.0),
                           workers=workers)
        return {"workers": workers, "tokens": manifest.splits["train"].tokens, "cpu_seconds": cpu_seconds() - cpu,
                "seconds": time.perf_counter() - start}


def measure_loader(length: int, packing: str, mixture: bool, folder: str, seconds: float) -> dict[str, object]:
    """Returns tokens per second of CPU time, over random rows of four files."""
    import numpy as np

    from dlm_jax.data.loader import Loader
    from dlm_jax.data.rows import Rows
    from dlm_jax.data.shards import RowLayout, ShardedRows, write_shard

    random, count = np.random.default_rng(0), (32 << 20) // length
    row_masks = ("starts",) if packing == "document_mask" else ()
    layout = RowLayout.for_vocab(length, 50_257, row_masks)
    shards = []
    for number in range(4):
        rows = Rows(random.integers(0, 50_257, (count // 4, length)).astype(np.uint32),
                    random.random((count // 4, length)) < 0.002 if row_masks else None)
        file = f"{length}-{packing}-{mixture}-{number}.array_record"
        shards.append(write_shard(folder, file, [layout.encode(rows)]))
    groups = [shards[:2], shards[2:]] if mixture else [shards]
    batch_size = (1 << 17) // length
    loader = Loader([ShardedRows(folder, group, layout) for group in groups], batch_size,
                    weights=(0.693584, 0.306416) if mixture else ())
    loader.batch(0)
    step, cpu, start = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        step += 1
        loader.batch(step)
    tokens = step * batch_size * length
    return {"length": length, "packing": packing, "mixture": mixture,
            "tokens_per_cpu_second": tokens / (time.process_time() - cpu),
            "tokens_per_second": tokens / (time.perf_counter() - start)}


def main() -> None:
    parser = harness.parser(__doc__, repeat=40, seconds=5.0)
    parser.add_argument("--tokenizer", required=True, help="a directory with a fast tokenizer")
    parser.add_argument("--data", nargs="+", required=True, help="JSONL files")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    from dlm_jax.data.sources import open_sources

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number in range(args.repeat):
            for source in open_sources(args.data):
                files.append(f"{folder}/{number}-{len(files)}.jsonl")
                shutil.copyfile(source.name, files[-1])
        loops = [plain_loop(files, tokenizer)]
        runs = [measure_prepare(files, tokenizer, workers) for workers in (0, 1, os.cpu_count())]
        loops.append(plain_loop(files, tokenizer))
        tokens, baseline = loops[0][0], max(tokens / cpu for tokens, cpu in loops)  # the faster one
        print(f"plain tokenizers loop: {baseline / 1e6:.3f} million tokens per CPU second ({tokens:,} tokens)")
        for run in runs:
            run["ratio"] = run["tokens"] / run["cpu_seconds"] / baseline
            print(f"dlm prepare, {run['workers']} workers: {run['ratio'] * baseline / 1e6:.3f} million tokens per CPU "
                  f"second, {run['ratio']:.2f} of the loop; {run['tokens'] / run['seconds'] / 1e6:.3f} per second")
        loaders = [measure_loader(*loader, folder, args.seconds) for loader in LOADERS]
    print("\n" + harness.table_head("row", "packing", "sources", "million tokens per second, one core",
                                    "of the target"))
    for loader in loaders:
        speed = loader["tokens_per_cpu_second"]
        print(harness.row(loader["length"], loader["packing"], 2 if loader["mixture"] else 1, f"{speed / 1e6:.1f}",
                          f"{speed / TARGET:.1f} x"))
    harness.write_results("data", {
        "plain_loop_tokens_per_cpu_second": baseline, "prepare": runs, "loader": loaders,
        "target_tokens_per_second": TARGET, "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine()},
        "tokenizers", "transformers", "grain", "array_record", "numpy")


if __name__ == "__main__":
    main()
