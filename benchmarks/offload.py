"""Peak memory, disk and time of `grasp compress` with a model's layers in memory and on the disk,
beside what `--dry-run` says before.

    python benchmarks/random_llama.py l8 --layers 8        0.59 billion parameters
    python benchmarks/random_llama.py l16 --layers 16      1.07
    python benchmarks/random_llama.py l48 --layers 48      3.02
    python benchmarks/offload.py l8 l16 l48 [--in-memory l8,l16] [--rounds 1]
        [--method grasp --fields num_layers=2,projections=attention] [--num-samples 1]
        [--seq-len 128] [-o results/offload.json]
    python benchmarks/offload.py --plot results/offload.json -o docs/offload.png

Every run is a fresh process; both ways take turns (A B A B ...), so that noise of the machine hits
both. Memory: the largest resident set, and what of it was there before the model was opened; and,
looked at every 20 ms, the largest without pages of files, which the system takes back when others
need the room. Disk: the largest that OUT and all files of the run took together, those without a
name among them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


def on_disk(folder: Path) -> int:
    """Bytes of the files below a folder, and of those without a name that this process has open."""
    total = 0
    for place, _, names in os.walk(folder):  # what goes meanwhile is passed over
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    for name in os.listdir("/proc/self/fd"):
        try:
            found = os.stat(f"/proc/self/fd/{name}")
            is_ours = os.readlink(f"/proc/self/fd/{name}").endswith(".sum (deleted)")
        except OSError:
            continue
        total += found.st_size if is_ours else 0
    return total


def anonymous() -> int:
    """Bytes of this process in memory that are no file's. 0 where the system does not say it."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


class Watched:
    """What this process takes inside, of memory (over what it had before) and of disk: below the
    folder, and files without a name. In bytes.
    """

    def __init__(self, folder: Path):
        self.folder, self.memory, self.anonymous, self.disk = folder, 0, 0, 0
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch)

    def __enter__(self) -> Watched:
        from grasp.evaluation.peak import resident_peak

        self.before, self._own = resident_peak(), anonymous()
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        from grasp.evaluation.peak import resident_peak

        self._over.set()
        self._watching.join()
        self.memory = resident_peak() - self.before

    def _watch(self) -> None:
        looks = 0
        while not self._over.wait(0.02):
            self.anonymous = max(self.anonymous, anonymous() - self._own)
            if looks % 10 == 0:
                self.disk = max(self.disk, on_disk(self.folder))
            looks += 1


def child(asked: dict[str, Any]) -> dict[str, Any]:
    """One run, in this process."""
    import torch

    import grasp
    from grasp.core.records import Calibration
    from grasp.verbs.dry_run import dry_run

    fields = {"method": asked["method"], **asked["fields"]}
    size = {"num_samples": asked["num_samples"], "seq_len": asked["seq_len"]}
    with tempfile.TemporaryDirectory(dir=asked["folder"]) as folder:
        place = {"offload": folder} if asked["offloaded"] else {}
        told = dry_run(asked["model"], **fields, **size, **place)
        ids = torch.randint(0, 49_000, tuple(size.values()), generator=torch.Generator())
        begin, used = time.perf_counter(), time.process_time()
        with Watched(Path(folder)) as found:
            done = grasp.compress(
                asked["model"],
                Path(folder) / "out",
                data=Calibration(ids, "random ids"),
                **fields,
                **place,
            )
        return {
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - used,
            "laps": done.manifest["seconds"],
            "parameters": done.parameters_before,
            "peak": found.before + found.memory,
            "before": found.before,
            "anonymous": found.anonymous,
            "disk": found.disk,
            "told": {**vars(told.cost), "seconds": told.seconds},
        }


def in_a_process(told: dict[str, Any], **environment: str) -> dict[str, Any]:
    """What `child` finds in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(told)]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(model: str, offloaded: bool, asked: argparse.Namespace) -> dict[str, Any]:
    """A row of the results."""
    told = {
        "model": model,
        "offloaded": offloaded,
        "method": asked.method,
        "fields": asked.fields,
        "num_samples": asked.num_samples,
        "seq_len": asked.seq_len,
        "folder": asked.folder,
    }
    row = {**told, **in_a_process(told)}
    row["bytes"] = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    grown, expected = row["peak"] - row["before"], row["told"]["memory"]
    print(
        f"{model:12s} {'disk  ' if offloaded else 'memory'} peak {row['peak'] / 1e6:6.0f} MB"
        f" ({100 * row['peak'] / row['bytes']:3.0f} % of the file), of it the run's"
        f" {grown / 1e6:6.0f} ({row['anonymous'] / 1e6:6.0f} without files), told"
        f" {expected / 1e6:6.0f}; disk {row['disk'] / 1e6:6.0f}, told"
        f" {row['told']['disk'] / 1e6:6.0f}; {row['seconds']:5.0f} s, of a core"
        f" {row['cpu_seconds']:5.0f}, told {row['told']['seconds']:5.0f}",
        flush=True,
    )
    return row


def plot(results: Path, picture: Path) -> None:
    """Peak memory against the size of the model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = json.loads(results.read_text())["rows"]
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for offloaded, label, color in (
        (False, "in memory", "#4a6fa5"),
        (True, "on the disk", "#c1440e"),
    ):
        points = sorted(
            (r["bytes"] / 1e9, r["peak"] / 1e9) for r in rows if r["offloaded"] == offloaded
        )
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=color, label=f"layers {label}")
    largest = max(row["bytes"] for row in rows) / 1e9
    axes.plot([0, largest], [0, 0.4 * largest], ":", color="#9aa5b1", label="40 % of the model")
    axes.set(
        xlabel="model, GB", ylabel="peak memory of the process, GB", xlim=(0, None), ylim=(0, None)
    )
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)


def pairs(text: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in text.split(",") if part)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*")
    parser.add_argument("--in-memory", default="")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--method", default="grasp")
    parser.add_argument("--fields", type=pairs, default="num_layers=2,projections=attention")
    parser.add_argument("--num-samples", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        fields = asked.child["fields"]
        fields |= {name: int(value) for name, value in fields.items() if str(value).isdigit()}
        if "layers" in fields:
            fields["layers"] = (fields["layers"],)
        sys.stdout.write(json.dumps(child(asked.child)) + "\n")
        return 0
    if asked.plot:
        plot(asked.plot, asked.output)
        return 0
    rows = []
    for _ in range(asked.rounds):
        for model in asked.models:
            ways = (True, False) if model in asked.in_memory.split(",") else (True,)
            rows += [measured(model, offloaded, asked) for offloaded in ways]
            if asked.output:
                from grasp.core.provenance import versions

                said = " ".join(["benchmarks/offload.py", *sys.argv[1:]])
                told = {"rows": rows, "versions": versions(), "command": said}
                asked.output.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
