"""Decode throughput of compressed models behind real vLLM servers, beside the dense model's, in
turn.

    .venv-serving/bin/python benchmarks/serving.py NAME=CHECKPOINT ... [--dtype float32]
    [--batch-sizes 1,16] [--rounds 3] [--eager]
                                                   [--of smollm2] [-o results/serving.json]

`make test-serving` makes that environment. The dense model is smollm2, or give `dense=PATH` and say
`--of` which model all are. All servers are up at once, on loopback; only one is asked at a time, in
the order A B A B. A request is a prompt of 32 random tokens and 96 greedy tokens, streamed. Decode
throughput is the tokens that arrive between the moment every request of the batch has its first
token and the moment the first of them ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grasp.core.models import embedded_model
from grasp.core.provenance import machine, versions

PROMPT, NEW = 32, 96


@contextlib.contextmanager
def server(path: str, dtype: str, eager: bool):
    """`vllm serve path`, its URL; ended by its own process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        path,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        dtype,
    ]
    command += [
        "--served-model-name",
        "m",
        "--max-model-len",
        "256",
        "--no-enable-prefix-caching",
        *(["--enforce-eager"] if eager else []),
    ]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ},
            start_new_session=True,
        )
        try:
            for _ in range(600):
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"{path}: the server ended: {log.read()[-2000:].decode()}")
                with (
                    contextlib.suppress(OSError),
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5),
                ):
                    break
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def arrivals(url: str, ids: list[int]) -> list[float]:
    """When each token of one streamed request came."""
    body = {
        "model": "m",
        "prompt": ids,
        "max_tokens": NEW,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return [time.perf_counter() for line in answer if line.startswith(b"data: {")]


def throughput(url: str, batch_size: int) -> float:
    """Tokens a second while all requests of the batch decode."""
    prompts = [[random.randrange(1000, 20000) for _ in range(PROMPT)] for _ in range(batch_size)]
    with ThreadPoolExecutor(batch_size) as pool:
        times = list(pool.map(lambda ids: arrivals(url, ids), prompts))
    begin, end = max(row[0] for row in times), min(row[-1] for row in times)
    return sum(begin < moment <= end for row in times for moment in row) / (end - begin)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="NAME=CHECKPOINT")
    parser.add_argument("--of", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-sizes", default="1,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    places = {"dense": str(embedded_model()), **dict(one.split("=", 1) for one in asked.models)}
    rows = []
    with contextlib.ExitStack() as servers:
        urls = {
            name: servers.enter_context(server(place, asked.dtype, asked.eager))
            for name, place in places.items()
        }
        for batch_size in map(int, asked.batch_sizes.split(",")):
            for url in urls.values():
                throughput(url, batch_size)  # warm-up
            found: dict[str, list[float]] = {name: [] for name in urls}
            for _ in range(asked.rounds):
                for name, url in urls.items():
                    found[name].append(throughput(url, batch_size))
            for name, speeds in found.items():
                ratios = [mine / dense for mine, dense in zip(speeds, found["dense"], strict=True)]
                size = sum(file.stat().st_size for file in Path(places[name]).glob("*.safetensors"))
                row = {
                    "of": asked.of,
                    "model": name,
                    "dtype": asked.dtype,
                    "mode": "eager" if asked.eager else "compiled",
                    "batch_size": batch_size,
                }
                row |= {
                    "file_bytes": size,
                    "tokens_per_second": statistics.median(speeds),
                    "ratio": statistics.median(ratios),
                }
                rows.append({**row, "low": min(ratios), "high": max(ratios)})
                print(
                    "{model:14} {dtype} {mode}, batch {batch_size:2}: {tokens_per_second:7.1f}"
                    " tokens/s, {ratio:.2f} × dense ({low:.2f} to {high:.2f})".format(**rows[-1]),
                    flush=True,
                )
    if asked.output:
        known = json.loads(asked.output.read_text())["rows"] if asked.output.exists() else []
        keys = ("of", "model", "dtype", "mode", "batch_size")
        kept = [row for row in known if all(any(row[k] != new[k] for k in keys) for new in rows)]
        whole = {
            "command": "benchmarks/serving.py",
            "machine": machine(),
            "versions": versions(),
            "rows": kept + rows,
        }
        asked.output.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
