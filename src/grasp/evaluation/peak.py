"""Peak memory of one model, from a fresh process that does nothing else: other models in memory,
and what made this one, would count too.

Run as `python -m grasp.evaluation.peak` with the request as a JSON argument; answers one JSON
object on stdout. The peak of a process on the CPU is its largest resident set, Python and libraries
included (`before_loading` says how much those are); on a GPU, what torch's allocator held at most.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from grasp.core.children import end_with_parent, run_child
from grasp.core.decoder import Decoder
from grasp.core.models import load_model
from grasp.core.stepping import Stepper

logger = logging.getLogger(__name__)


def peak_memory(
    decoder: Decoder, batch_size: int, prompt_len: int, new_tokens: int
) -> dict[str, Any] | None:
    """{"peak", "before_loading"} in bytes, of loading the model's source anew and running it. None,
    with a warning, where that is not this model.
    """
    asked = {
        "source": decoder.source,
        "device": str(decoder.device),
        "dtype": str(decoder.model.dtype).removeprefix("torch."),
        "shape": [batch_size, prompt_len, new_tokens],
        "threads": torch.get_num_threads(),
    }
    done = run_child([sys.executable, "-m", __name__, json.dumps(asked)], stderr=subprocess.PIPE)
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        logger.warning(
            "peak memory of %s not measured: %s",
            decoder.source,
            (done.stderr.strip().splitlines() or ["the process died"])[-1],
        )
        return None
    if found.pop("parameters") != decoder.num_parameters():
        logger.warning(
            "peak memory of %s not measured: the model in memory is not the one at its source; save"
            " it and give the path",
            decoder.source,
        )
        return None
    return found


def resident_peak() -> int:
    """Largest resident set of this process so far, in bytes. (`ru_maxrss` of a new process starts
    at its parent's on Linux.)
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )


@torch.no_grad()
def main(asked: dict[str, Any]) -> dict[str, Any]:
    """The child's work: load, one prompt, the steps."""
    torch.set_num_threads(asked["threads"])
    before = resident_peak()
    model = load_model(asked["source"], device=asked["device"], dtype=asked["dtype"])
    runner = Stepper(model, *asked["shape"])
    runner.prefill()
    runner.decode(asked["shape"][2])
    peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else resident_peak()
    return {"peak": peak, "before_loading": before, "parameters": model.num_parameters()}


if __name__ == "__main__":
    end_with_parent()
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))) + "\n")
