"""One process and four see the same global batches; each of the four reads only rows that its own devices hold."""

import json
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from dlm_jax.data.config import RowsConfig
from dlm_jax.data.loader import Loader
from dlm_jax.data.manifest import read_manifest
from dlm_jax.data.prepare import prepare
from dlm_jax.data.sources import open_sources

STEPS, BATCH = (0, 1, 2, 57), 16

PROCESS = textwrap.dedent("""
    import sys
    import jax
    import numpy as np

    port, rank, rows, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 4, rank)
    from tests.data.test_processes import BATCH, STEPS, make_loader
    from dlm_jax.parallel import MeshConfig, make_mesh, make_global_batch

    mesh, loader, read_rows = make_mesh(MeshConfig(data=4, fsdp=2)), make_loader(rows), set()
    whole_batch = loader.batch
    loader.batch = lambda step, part: read_rows.update(range(part.start, part.stop)) or whole_batch(step, part)
    found = {}
    for step in STEPS:
        batches = loader.batches(step, lambda read: make_global_batch(read, BATCH, mesh))
        batch = next(batches)
        batches.close()
        for name in ("tokens", "noisable_mask", "example_index", "segment_ids", "positions"):
            for shard in getattr(batch, name).addressable_shards:
                found[f"{step}/{name}/{shard.index[0].start or 0}"] = np.asarray(shard.data)
    np.savez(out, read_rows=sorted(read_rows), **found)
""")


def make_loader(directory: str) -> Loader:
    manifest = read_manifest(directory)
    sources = [manifest.rows(directory, part) for part in ("train", "validation")]
    return Loader(sources, BATCH, weights=(0.75, 0.25), seed=3, random_length=0.1)


def test_one_process_and_four_see_the_same_batches(tmp_path, tokenizer):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"story number {i} " * (1 + i % 5)}) + "\n" for i in range(400)))
    rows = str(tmp_path / "rows")
    prepare(open_sources([str(text)]), rows, tokenizer, RowsConfig(length=32, packing="document_mask", validation_fraction=0.2))
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

    loader, read_by = make_loader(rows), []
    for rank in range(4):
        with np.load(tmp_path / f"{rank}.npz") as found:
            read_by.append(set(found["read_rows"].tolist()))
            for key in set(found) - {"read_rows"}:
                step, name, start = key.split("/")
                whole = getattr(loader.batch(int(step)), name)
                np.testing.assert_array_equal(found[key], whole[int(start) : int(start) + len(found[key])], key)
    assert sorted(row for rows in read_by for row in rows) == list(range(BATCH))  # all of them, and none twice
