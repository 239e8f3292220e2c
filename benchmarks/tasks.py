"""Multiple-choice tasks of a checkpoint beside the dense model, by lm-eval with its own prompts,
from local files.

    pip install lm_eval==0.4.13
    python benchmarks/tasks.py FOLDER MODEL [MODEL ...] [-o results/tasks.json] [--limit N]

FOLDER holds `arc_easy/test.jsonl`, `piqa/validation.jsonl`, `openbookqa/test.jsonl` in the Hugging
Face schemas (not part of this repository). MODEL: `smollm2` or a checkpoint directory; the first is
what the others are compared with. Zero-shot, full sets, bfloat16. About an hour a model on one
core. Finished models are kept in the output file and not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from grasp.core.models import load_model
from grasp.core.provenance import versions

FILES = {
    "arc_easy": ("test", "acc_norm"),
    "piqa": ("validation", "acc_norm"),
    "openbookqa": ("test", "acc_norm"),
}


def stock_task(manager: TaskManager, name: str, folder: Path) -> dict:
    """lm-eval's own task with its data read from a local file."""
    task = dict(load_yaml(manager.task_index[name].yaml_path))
    split = FILES[name][0]
    task.update(
        dataset_path="json",
        dataset_name=None,
        dataset_kwargs={"data_files": {split: str(folder / name / f"{split}.jsonl")}},
    )
    task.update(training_split=None, validation_split=None, test_split=split, fewshot_split=None)
    return task


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("-o", "--output", type=Path, default=Path("results/tasks.json"))
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    done = json.loads(arguments.output.read_text())["models"] if arguments.output.exists() else {}
    manager = TaskManager()
    for model in arguments.models:
        name = Path(model).name
        if name in done:
            continue
        decoder = load_model(model, dtype="bfloat16")
        harness = HFLM(pretrained=decoder.model, tokenizer=decoder.tokenizer, batch_size=32)
        tasks = [stock_task(manager, task, arguments.folder) for task in FILES]
        found = lm_eval.simple_evaluate(
            harness,
            tasks=tasks,
            num_fewshot=0,
            limit=arguments.limit,
            bootstrap_iters=0,
            log_samples=False,
        )
        done[name] = {"parameters": decoder.num_parameters(), "tasks": {}}
        for task, (_, metric) in FILES.items():
            value = found["results"][task][f"{metric},none"]
            count = found["n-samples"][task]["effective"]
            done[name]["tasks"][task] = {
                "metric": metric,
                "value": value,
                "stderr": math.sqrt(value * (1 - value) / count),
                "questions": count,
                "acc": found["results"][task]["acc,none"],
            }
        arguments.output.write_text(
            json.dumps(
                {
                    "models": done,
                    "lm_eval": lm_eval.__version__,
                    "versions": versions(),
                    "command": "python " + " ".join(sys.argv),
                },
                indent=1,
            )
            + "\n"
        )
    reference = next(iter(done.values()))["tasks"]
    for name, row in done.items():
        shares = [row["tasks"][task]["value"] / reference[task]["value"] for task in FILES]
        values = "  ".join(
            f"{task} {row['tasks'][task]['value']:.4f} ± {row['tasks'][task]['stderr']:.4f}"
            for task in FILES
        )
        print(
            f"{name:12s} {row['parameters']:>11,}  {values}  mean share of the first"
            f" {sum(shares) / len(shares):.1%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
