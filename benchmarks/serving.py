"""Measures `dlm serve` from outside: concurrent clients against one after another, overload, and equal texts.

    python benchmarks/serving.py                                          the small model that comes with the library
    python benchmarks/serving.py --model=SmolLM2-135M.gguf --new_tokens=32
    python benchmarks/serving.py --overload_minutes=10
    python benchmarks/serving.py --url=http://127.0.0.1:8000 --model=...  a server that runs already, of the same model

The server is a process of its own. The same streams are asked for by `--clients` clients at a time and by one; both
take turns, so that other load on the machine affects both. A time between chunks is what a reader waits for more text;
a time per token is that from a stream's first text to its last, divided by the tokens but one. Rows per pass is the
number of texts that a forward pass of the server advanced.

Overload is an open loop: requests arrive at random times (a Poisson process), whether earlier ones are answered or not,
at twice the rate at which the server answers twice as many clients as it samples texts at a time. At last, served texts
are compared with those of `DiffusionLM.generate`, of the same prompts, seeds and type. Writes
benchmarks/results/serving-MODEL-DEVICE-DTYPE.json.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import harness
import httpx
import numpy as np

PROMPTS = ("Once upon a time", "Tom had a big red ball.", "One day, Lily and her mom went to the park to play.",
           "The cat sat on the mat", "Ben was sad, because", "There was a little bird who could not fly. Every day",
           '"Look," said Sue,', "In a small house by the sea lived an old man and his dog. They")
OVERLOAD = 2.0  # times the capacity
OUTCOMES = ("answered", "refused with 429", "begun, not answered", "other")
LATENCIES = {"first": "to the first text", "between": "between chunks", "per_token": "per token"}


@dataclasses.dataclass
class Reply:
    """What came of a request.

    Attributes:
      status: of HTTP; 0: there was no connection.
      is_complete: it was answered to its end, without an error.
      started, chunks: when the request was sent, and when each chunk with text came, in seconds.
    """

    status: int = 0
    is_complete: bool = False
    text: str = ""
    tokens: int = 0
    passes: int = 0
    error: str = ""
    started: float = 0.0
    chunks: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that can be asked, and its process if it was started here."""

    url: str
    pid: int | None

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        return httpx.AsyncClient(base_url=self.url, timeout=600, limits=limits, headers=headers())

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers(), timeout=60).raise_for_status()

    def metrics(self) -> dict[str, float]:
        """Returns the engine's counts and gauges."""
        lines = (line.rpartition(" ") for line in self.get("/metrics").text.splitlines())
        return {name: float(value) for name, _, value in lines if name.startswith("dlm_engine_")}

    def memory(self) -> float | None:
        """Returns MiB in memory, or None of a process that was not started here or where /proc is not."""
        path = pathlib.Path(f"/proc/{self.pid}/status")
        if self.pid is None or not path.exists():
            return None
        return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("VmRSS")) / 1024


def headers() -> dict[str, str]:
    return {"Authorization": f"Bearer {os.environ['DLM_API_KEY']}"} if "DLM_API_KEY" in os.environ else {}


@contextlib.contextmanager
def start_server(args: argparse.Namespace) -> Iterator[Server]:
    """Yields a server of the model; at the end it must stop by itself when it is asked to."""
    if args.url:
        yield Server(args.url.rstrip("/"), None)
        return
    command = [sys.executable, "-m", "dlm_jax.cli.main", "serve", f"--model={args.model}", f"--dtype={args.dtype}",
               "--port=0", f"--max_batch={args.clients}"]
    environment = os.environ | {"PYTHONPATH": str(harness.ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            url = next((word for word in child.stdout.readline().split() if word.startswith("http://")), None)
            if url is None:
                raise SystemExit(f"{' '.join(command)} ended with {child.wait()}")
            yield Server(url, child.pid)
        finally:
            child.terminate()
            status = child.wait(60)
    if status:
        raise SystemExit(f"the server ended with {status} when it was asked to stop")


async def ask(client: httpx.AsyncClient, model: str, number: int, new_tokens: int) -> Reply:
    """Sends request `number`, and reads its stream to the end."""
    reply = Reply(started=time.perf_counter())
    body = {"model": model, "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": new_tokens, "seed": number,
            "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            reply.status = answer.status_code
            if answer.is_error:
                await answer.aread()
                return reply
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    reply.is_complete = not reply.error
                elif line.startswith("data: "):
                    read_chunk(reply, json.loads(line[len("data: ") :]))
    except httpx.HTTPError as error:
        reply.error = repr(error)
    return reply


def read_chunk(reply: Reply, chunk: dict) -> None:
    if "error" in chunk:
        reply.error = chunk["error"]["message"]
        return
    text = "".join(choice["text"] for choice in chunk["choices"])
    if text:
        reply.chunks.append(time.perf_counter())
        reply.text += text
    if chunk.get("usage"):
        reply.tokens, reply.passes = chunk["usage"]["completion_tokens"], chunk["usage"]["forward_passes"]


async def run_clients(server: Server, model: str, args: argparse.Namespace, clients: int) -> tuple[float, list[Reply]]:
    """Returns the seconds in which `clients` clients got all requests answered, each one after another."""
    numbers, replies = iter(range(args.requests)), []

    async def one(client: httpx.AsyncClient) -> None:
        for number in numbers:
            replies.append((number, await ask(client, model, number, args.new_tokens)))

    async with server.client() as client:
        started = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        seconds = time.perf_counter() - started
    failed = [reply for _, reply in replies if not reply.is_complete]
    if failed:
        raise SystemExit(f"{len(failed)} of {args.requests} requests failed: {failed[0].status} {failed[0].error}")
    return seconds, [reply for _, reply in sorted(replies, key=lambda one: one[0])]


def latencies(replies: Sequence[Reply]) -> dict[str, dict[str, float]]:
    """Returns the 50th and 99th percentiles of times in milliseconds."""
    found: dict[str, list[float]] = {name: [] for name in LATENCIES}
    for reply in replies:
        if reply.chunks:
            found["first"].append(reply.chunks[0] - reply.started)
            found["between"] += np.diff(reply.chunks).tolist()
        if len(reply.chunks) > 1 and reply.tokens > 1:
            found["per_token"].append((reply.chunks[-1] - reply.chunks[0]) / (reply.tokens - 1))
    return {name: {f"p{q}": 1e3 * float(np.percentile(seconds, q)) if seconds else None for q in (50, 99)}
            for name, seconds in found.items()}


def measure_throughput(server: Server, model: str, args: argparse.Namespace) -> dict[str, dict]:
    """Returns for each way of asking: tokens and requests per second, and latencies; of all turns together."""
    sides = {"one after another": 1, f"{args.clients} at a time": args.clients}
    replies: dict[str, list[Reply]] = {name: [] for name in sides}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    texts: dict[str, list[str]] = {}
    batches = dict.fromkeys(sides, 0.0)  # forward passes of the server
    for turn in range(args.repeats + 1):  # the first compiles and does not count
        for name, clients in sides.items():
            passes = server.metrics()["dlm_engine_passes_total"]
            took, found = asyncio.run(run_clients(server, model, args, clients))
            passes = server.metrics()["dlm_engine_passes_total"] - passes
            texts[name] = [reply.text for reply in found]
            if turn:
                seconds[name].append(took)
                replies[name] += found
                batches[name] += passes
    results = {}
    for name, found in replies.items():
        tokens, passes, took = sum(reply.tokens for reply in found), sum(reply.passes for reply in found), sum(
            seconds[name])
        results[name] = {
            "seconds": seconds[name], "tokens": tokens, "tokens_per_second": tokens / took,
            "requests_per_second": len(found) / took, "tokens_per_pass": tokens / passes,
            "rows_per_pass": passes / batches[name], "milliseconds": latencies(found)}
    one, many = sides
    return {"sides": results, "ratio": harness.median_ratio(seconds[one], seconds[many]),
            "equal_texts": sum(a == b for a, b in zip(texts[one], texts[many], strict=True)),
            "requests": args.requests}


async def overload(server: Server, model: str, args: argparse.Namespace, rate: float) -> dict[str, object]:
    """Returns what became of requests that arrive at random, `rate` a second, and the server's memory by minute."""
    arrivals, replies, memory = random.Random(0), [], [server.memory()]
    before, began = server.metrics(), time.perf_counter()
    end, due, minute = began + 60 * args.overload_minutes, began, began + 60

    async with server.client() as client, asyncio.TaskGroup() as tasks:

        async def one(number: int) -> None:
            replies.append(await ask(client, model, number, args.new_tokens))

        number = late = 0
        while (due := due + arrivals.expovariate(rate)) < end:
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            late = max(late, time.perf_counter() - due)
            tasks.create_task(one(number))
            number += 1
            if time.perf_counter() >= minute:
                memory.append(server.memory())
                minute += 60
    seconds = time.perf_counter() - began
    memory.append(server.memory())
    counts = Counter(map(outcome, replies))
    after, answered = server.metrics(), [reply for reply in replies if reply.is_complete]
    return {"arrivals_per_second": rate, "sent": len(replies), "counts": {name: counts[name] for name in OUTCOMES},
            "statuses": dict(Counter(reply.status for reply in replies)), "seconds": seconds,
            "latest_arrival_seconds": late, "errors": sorted({reply.error for reply in replies if reply.error})[:10],
            "tokens_per_second": sum(reply.tokens for reply in answered) / seconds,
            "milliseconds": latencies(answered), "memory_mib": memory,
            "metrics": {"before": before, "after": after}}


def outcome(reply: Reply) -> str:
    if reply.is_complete:
        return "answered"
    return "refused with 429" if reply.status == 429 else "begun, not answered" if reply.status == 200 else "other"


def compare_texts(server: Server, model: str, policy: str, args: argparse.Namespace) -> dict[int, int]:
    """Returns for one client and for all at a time: how many texts are those of `DiffusionLM.generate`."""
    from dlm_jax import DiffusionLM

    served = {clients: asyncio.run(run_clients(server, model, args, clients))[1] for clients in (1, args.clients)}
    lm = DiffusionLM.from_pretrained(args.model, dtype=args.dtype)
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(args.requests)]
    texts = [lm.generate(prompt, max_new_tokens=args.new_tokens, seed=number, policy=policy)[0]
             for number, prompt in enumerate(prompts)]
    return {clients: sum(prompt + reply.text == text for prompt, reply, text in zip(prompts, replies, texts,
                                                                                    strict=True))
            for clients, replies in served.items()}


def print_throughput(results: dict) -> None:
    print(harness.table_head("requests", "tokens/s", "requests/s", "tokens per pass", "rows per pass",
                             *(f"ms {meaning}, 50% / 99%" for meaning in LATENCIES.values())))
    for name, side in results["sides"].items():
        print(harness.row(name, f"{side['tokens_per_second']:.1f}", f"{side['requests_per_second']:.2f}",
                          f"{side['tokens_per_pass']:.2f}", f"{side['rows_per_pass']:.2f}",
                          *map(percentiles, side["milliseconds"].values())))
    print(f"\nratio {results['ratio']:.2f}; {results['equal_texts']} of {results['requests']} texts are the same")


def print_overload(found: dict) -> None:
    print(f"\n{found['arrivals_per_second']:.2f} requests a second, {OVERLOAD:g} times the capacity, for "
          f"{found['seconds'] / 60:.1f} minutes")
    print(harness.table_head("requests", *found["counts"], "tokens/s", "ms to the first text, 50% / 99%"))
    print(harness.row(found["sent"], *found["counts"].values(), f"{found['tokens_per_second']:.1f}",
                      percentiles(found["milliseconds"]["first"])))
    before, after = found["metrics"]["before"], found["metrics"]["after"]
    rows = {name.split('"')[1]: after[name] - before.get(name, 0) for name in after if "_rows_total{" in name}
    print("\nrows of the engine: " + ", ".join(f"{number:.0f} {name}" for name, number in rows.items()))
    if None not in found["memory_mib"]:
        print("\nMiB in memory at the start, each minute and the end: "
              + ", ".join(f"{mib:.0f}" for mib in found["memory_mib"]))
    for error in found["errors"]:
        print(error)


def percentiles(found: dict[str, float]) -> str:
    return " / ".join("-" if value is None else f"{value:.{int(value < 10)}f}" for value in found.values())


def main() -> None:
    parser = harness.parser(__doc__, clients=8, requests=32, new_tokens=64, repeats=3, overload_minutes=0.0)
    parser.add_argument("--model", default="stories", help="what is served, as for dlm serve (default %(default)s)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32")
    parser.add_argument("--url", help="a server that runs; its --model and --dtype must be those given here")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two processes share an accelerator
    with start_server(args) as server:
        card = server.get("/v1/models").json()["data"][0]
        model = card["id"]
        settings = harness.settings(args, "model") | {"model": pathlib.PurePath(args.model).name}
        results = {"settings": settings, "throughput": measure_throughput(server, model, args)}
        print_throughput(results["throughput"])
        if args.overload_minutes:
            seconds, _ = asyncio.run(run_clients(server, model, args, 2 * args.clients))
            results["overload"] = asyncio.run(overload(server, model, args, OVERLOAD * args.requests / seconds))
            print_overload(results["overload"])
        results["equal_texts"] = compare_texts(server, model, card["dlm"]["default_policy"], args)
        for clients, equal in results["equal_texts"].items():
            print(f"\n{equal} of {args.requests} texts that were served {clients} at a time are those of "
                  f"DiffusionLM.generate ({args.dtype})")
    name = pathlib.PurePath(model).name.lower()
    harness.write_results(f"serving-{name}-{harness.device_name()}-{args.dtype}", results, "jax", "starlette",
                          "uvicorn")


if __name__ == "__main__":
    main()
