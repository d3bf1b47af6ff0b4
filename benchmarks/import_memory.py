"""How much memory importing a checkpoint takes beyond the parameters it makes.

    python benchmarks/import_memory.py

writes sharded LLaMA checkpoints of 1 GB in float32, bfloat16 and float16, imports each as float32 in a process
of its own, and compares the peak of its anonymous memory (RssAnon and RssShmem of /proc/self/status; mapped files are
not counted, because the system may drop them) above what it had before, with the bytes of the parameters. Prints a
table, writes benchmarks/results/import_memory.json, and fails above a ratio of 1.25.
"""

import argparse
import json
import pathlib
import platform
import subprocess
import sys
import tempfile
import threading
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dlm_jax.checkpoints import config_from_hf, hf_names, load_pretrained
from dlm_jax.checkpoints.hf_tensors import write_tensors
from dlm_jax.models import abstract_model

LIMIT = 1.25
NUM_LAYERS = {"float32": 3, "bfloat16": 8, "float16": 8}  # 1 GB each


def write_checkpoint(directory: pathlib.Path, dtype: str) -> None:
    """Writes an untied LLaMA with random weights in shards of 200 MB."""
    hf = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": NUM_LAYERS[dtype],
          "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 5632,
          "max_position_embeddings": 2048, "torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(hf))
    shapes = {}
    for path, leaf in nnx.to_flat_state(nnx.state(abstract_model(config_from_hf(hf)))):
        key = hf_names.KEYS["llama"][".".join(path)]
        shapes |= {name: hf_names.hf_shape(key, shape) for name, shape in hf_names.layer_tensors(key, leaf.shape)}
    random = np.random.default_rng(0)
    write_tensors(directory, shapes, lambda name: random.standard_normal(shapes[name], np.float32),
                  jnp.dtype(dtype), max_shard_bytes=200e6)


def anonymous_bytes() -> int:
    """Returns the memory of this process that is not backed by a file."""
    status = pathlib.Path("/proc/self/status").read_text()
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines()
               if line.startswith(("RssAnon:", "RssShmem:")))


def measure(directory: str) -> dict[str, float]:
    """Imports a checkpoint while a thread watches the memory."""
    jax.devices()
    base, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    params = jax.block_until_ready(nnx.state(load_pretrained(directory).model))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {"parameter_bytes": size, "peak_bytes": peak - base, "ratio": (peak - base) / size, "seconds": seconds}


def main() -> None:
    """Makes the checkpoints, measures each in a fresh process, reports."""
    parser = harness.parser(__doc__)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    results = {}
    print(harness.table_head("source", "checkpoint, GB", "parameters, GiB", "peak, GiB", "peak / parameters",
                             "seconds"))
    for dtype in NUM_LAYERS:
        with tempfile.TemporaryDirectory() as directory:
            write_checkpoint(pathlib.Path(directory), dtype)
            stored = sum(file.stat().st_size for file in pathlib.Path(directory).glob("*.safetensors"))
            command = [sys.executable, __file__, f"--measure={directory}"]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        results[dtype] = {"checkpoint_bytes": stored} | result
        print(f"| {dtype} | {stored / 1e9:.2f} | {result['parameter_bytes'] / 2**30:.2f} | "
              f"{result['peak_bytes'] / 2**30:.2f} | {result['ratio']:.3f} | {result['seconds']:.1f} |", flush=True)
    machine = f"{platform.system()} {platform.machine()}"
    harness.write_json("import_memory", {"limit": LIMIT, "platform": machine, "jax": jax.__version__,
                                         "to_float32_from": results})
    if worst := [dtype for dtype, result in results.items() if result["ratio"] > LIMIT]:
        sys.exit(f"importing from {', '.join(worst)} takes more than {LIMIT} times the parameters' memory")


if __name__ == "__main__":
    main()
