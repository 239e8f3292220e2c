"""Tasks: questions put to a model by lm-eval 0.4.13, with its own prompts and metrics, from the hub
or from local files.

    arc_easy, openbookqa, gsm8k, mmlu, boolq, race, cmmlu, ...
                                whatever lm-eval knows, by its name there
    commonsense                 the seven commonsense tasks of the paper
    opencompass-ppl             its twelve in OpenCompass's perplexity mode (`perplexity_mode.py`),
                                and ocnli: files of ours in lm-eval's form, in `task_yaml`
    longbench, longbench_qasper, ...
                                lm-eval's prompts, the rest as published (`longbench.py`)

A multiple-choice task gives the model a question and takes the option with the highest
log-likelihood: in total (`acc`), a character (`acc_norm`), or, in perplexity mode, a token of the
whole text (`acc_ppl`). Each task is run by itself, so its numbers do not depend on what else was
asked for, and are lm-eval's on that task. lm-eval is imported in this file only, on first use.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import HF_HUB_OFFLINE

from grasp.core.decoder import Decoder
from grasp.core.extras import need
from grasp.core.hub import reachable
from grasp.core.processes import of_all, rank, world_size
from grasp.core.progress import Progress, silent
from grasp.core.score import Score
from grasp.errors import DataError, GraspError, RecipeError
from grasp.evaluation.longbench import HUB as LONGBENCH
from grasp.evaluation.longbench import published
from grasp.evaluation.perplexity_mode import by_subject, sums_whole_texts
from grasp.evaluation.shared_prefix import share_prefixes
from grasp.evaluation.task_files import no_bars, with_local_data
from grasp.evaluation.task_names import BUNDLES, VERSION, leaves, names_of, refuse
from grasp.evaluation.task_questions import (
    Answers,
    bootstrap_error,
    fit_to_model,
    no_bar,
    one_line,
    try_out,
)
from grasp.evaluation.task_scores import scores_of, summarize

__all__ = ["BUNDLES", "check_tasks", "run_tasks", "summarize"]

logger = logging.getLogger(__name__)

BOOTSTRAP = 1000
"""Resamples for a metric whose standard error has no formula (F1, Matthews correlation, ...);
lm-eval takes 100,000, on all cores.
"""


@dataclass(frozen=True)
class _Job:
    """A task or group, ready to run: what `TaskManager.load` returned, and where its questions come
    from ({} from the hub).
    """

    name: str
    loaded: Mapping[str, Any]
    files: Mapping[str, list[Path]] = field(default_factory=dict)


def run_tasks(
    decoder: Decoder,
    tasks: Sequence[str],
    *,
    task_data: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[Score, ...]:
    """Scores of the model, one for each task and metric; of a group, its own and then those of its
    tasks.

    Args:
        tasks: names, see the top of this file.
        task_data: folder with `<task>/<split>.jsonl` to read in place of the hub.
        limit: only the first so many questions of each task.
        num_fewshot: worked examples in the prompt, None for the task's own number; lm-eval ignores
            it where a task fixes 0.
        seed: draws the worked examples. 0 gives lm-eval's own draw.

    Raises `RecipeError`, `DataError` (before the model runs) or `NumericsError` (a log-likelihood
    that is not finite).
    """
    if not tasks:
        return ()
    if batch_size < 1:
        raise RecipeError(f"--batch-size {batch_size}: must be 1 or more")
    if decoder.tokenizer is None:
        raise DataError("--tasks: questions need a tokenizer, and this model has none")
    with _quiet():
        jobs = _prepare(tasks, task_data, num_fewshot, limit, seed)
        # a copy of the tokenizer, since lm-eval gives it a padding token where it has none
        wrap = importlib.import_module("lm_eval.models.huggingface").HFLM
        tokenizer = copy.deepcopy(decoder.tokenizer)
        if decoder.block_bos is not None and tokenizer("a").input_ids[:1] != [decoder.block_bos]:
            tokenizer.add_bos_token = True  # the model needs what its tokenizer's files leave out
        harness = wrap(pretrained=decoder.model, tokenizer=tokenizer, batch_size=batch_size)
        share_prefixes(harness, decoder)
        if world_size() > 1:
            _share(harness)
        for job in jobs:
            for name, task in job.loaded["tasks"].items():
                fit_to_model(task, name, harness)
        return tuple(score for job in jobs for score in _run(job, harness, limit, seed, progress))


def _share(harness: Any) -> None:
    """Let lm-eval share the questions among the processes, as where it loads the model itself."""
    accelerator = importlib.import_module("accelerate").Accelerator
    harness.accelerator = accelerator(cpu=harness.device.type == "cpu")
    harness._rank, harness._world_size = rank(), world_size()


def _run(job: _Job, harness: Any, limit: int | None, seed: int, progress: Progress) -> list[Score]:
    """Put the questions of one task or group to the model."""
    answers = Answers(job.name, job.loaded["tasks"].values(), harness, progress)
    harness.set_cache_hook(answers)
    harness.softmax_dtype = torch.float32 if any(map(sums_whole_texts, answers.tasks)) else None
    _seed(seed)
    found = importlib.import_module("lm_eval.evaluator").evaluate(
        lm=harness, task_dict=job.loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False
    )
    protocol: dict[str, Any] = {
        "harness": f"lm-eval {VERSION}",
        "limit": limit,
        "batch_size": harness.batch_size,
        "data": "hub",
    }
    if harness.softmax_dtype is not None:
        protocol["log_softmax"] = "float32"
    if job.files:
        protocol.update(
            data="local",
            files=sorted({path.name for files in job.files.values() for path in files}),
        )
    protocol |= _cuts(job.name, answers)
    scores = [] if found is None else scores_of(found, job.name, protocol)  # None: not the first
    if world_size() == 1:
        return scores
    return [Score.from_json(one) for one in of_all([score.to_json() for score in scores])[0]]


def _cuts(name: str, answers: Answers) -> dict[str, Any]:
    """How many prompts were made shorter, for the protocol; warned of too."""
    said: dict[str, Any] = {}
    own = sum(getattr(task, "num_cut", 0) for task in answers.tasks)
    if answers.num_cut + own:
        middle = any((task.config.metadata or {}).get("cut") == "middle" for task in answers.tasks)
        said["prompts_cut"] = answers.num_cut + own
        said |= {"cut": "middle"} if middle else {}
        logger.warning(
            "%s: %d prompts are longer than the model reads and lost their %s",
            name,
            said["prompts_cut"],
            "middle" if middle else "beginning",
        )
    shortened = sum(getattr(task, "num_shortened", 0) for task in answers.tasks)
    if shortened:
        logger.warning(
            "%s: %d questions are asked with fewer worked examples, since the model does not read"
            " them all",
            name,
            shortened,
        )
        said["fewer_examples"] = shortened
    return said


def check_tasks(
    tasks: Sequence[str],
    task_data: Path | None = None,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> None:
    """Find what is wrong with the names, the data and the prompts before a model is loaded. Raises
    `RecipeError` or `DataError`.

    Arguments as for `run_tasks`. Without tasks nothing is looked at, and lm-eval need not be
    installed.
    """
    if tasks:
        with _quiet():
            _prepare(tasks, task_data, num_fewshot, limit, seed)


def _prepare(
    tasks: Sequence[str], folder: Path | None, num_fewshot: int | None, limit: int | None, seed: int
) -> list[_Job]:
    """Everything up to the first pass of a model."""
    if limit is not None and limit < 1:
        raise RecipeError(f"--limit {limit}: must be 1 or more")
    if num_fewshot is not None and num_fewshot < 0:
        raise RecipeError(f"--num-fewshot {num_fewshot}: must be 0 or more")
    names = names_of(tasks, _index())
    if folder is None and not reachable() and not HF_HUB_OFFLINE:
        raise DataError(
            f"--tasks {names[0]}: the Hugging Face hub cannot be reached; give the data as"
            f" --task-data FOLDER with FOLDER/{names[0]}/<split>.jsonl, or set HF_HUB_OFFLINE=1 to"
            " use your cache"
        )
    jobs = []
    for name in names:
        _seed(seed)
        refuse(name, _index()[name].cfg or {})
        job = _load(name, folder, num_fewshot)
        for part, task in job.loaded["tasks"].items():
            refuse(part, vars(task.config))
            _set_fewshot(task, part, num_fewshot, seed)
            if job.files:
                try_out(task, part, limit, job.files[part])
        jobs.append(job)
    return jobs


@cache
def _index() -> Mapping[str, Any]:
    """lm-eval's tasks and ours by name. Reading its 14,000 files takes ten seconds, so it is done
    once. Raises `RecipeError`.
    """
    need("--tasks", "tasks", "lm_eval", "accelerate")
    found = importlib.metadata.version("lm_eval")
    if found != VERSION:
        raise RecipeError(
            f"--tasks: needs lm-eval {VERSION}, {found} is installed; run `pip install"
            f" lm-eval=={VERSION}`"
        )
    manager = importlib.import_module("lm_eval.tasks").TaskManager(
        include_path=str(Path(__file__).with_name("task_yaml"))
    )
    index = manager.task_index
    by_subject(index)
    for entry in index.values():
        if (entry.cfg or {}).get("dataset_path") == LONGBENCH:
            entry.cfg, entry.yaml_path = published(entry.cfg), None
    return index


def _load(name: str, folder: Path | None, num_fewshot: int | None) -> _Job:
    """Build one task or group with its data. Raises `RecipeError` or `DataError` for all that can
    go wrong there.
    """
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_defaults=False)
    manager.task_index.update(_index())
    files: dict[str, list[Path]] = {}
    try:
        if folder is not None:
            for part in leaves(name, manager.task_index):
                files[part] = _read_locally(manager.task_index, part, folder, num_fewshot)
        loaded = manager.load([name])
    except GraspError:
        raise
    except ImportError as failure:
        raise RecipeError(
            f"--tasks {name}: lm-eval needs another package for it ({one_line(failure)}); install"
            " that package"
        ) from failure
    except Exception as failure:
        # data sets, templates and lm-eval's functions raise many kinds: the task cannot be asked
        if folder is not None:
            place = ", ".join(map(str, files.get(name, ()))) or folder / name
            raise DataError(
                f"--task-data {folder}: {name} cannot be asked from {place}: {one_line(failure)}"
            ) from failure
        raise DataError(
            f"--tasks {name}: its data set did not come from the Hugging Face hub"
            f" ({one_line(failure)}); check the network, or give the data as --task-data FOLDER"
            f" with FOLDER/{name}/<split>.jsonl"
        ) from failure
    return _Job(name, loaded, files)


def _read_locally(
    index: dict[str, Any], name: str, folder: Path, num_fewshot: int | None
) -> list[Path]:
    """Put a task with local data in place of the stock one. Returns the files of its questions."""
    loader = importlib.import_module("lm_eval.tasks._yaml_loader")
    entry = index[name]
    config = loader.load_yaml(entry.yaml_path) if entry.yaml_path else dict(entry.cfg)
    if "class" in config:
        raise RecipeError(
            f"--tasks {name}: a Python class of lm-eval that fetches its own data; it cannot use"
            " --task-data"
        )
    own = config.get("num_fewshot")
    shots = num_fewshot if num_fewshot is not None and own != 0 else own or 0
    local, files = with_local_data(config, name, folder, shots)
    index[name] = type(entry)(
        name=name, kind=entry.kind, yaml_path=None, cfg=local, tags=entry.tags
    )
    return files


def _set_fewshot(task: Any, name: str, num_fewshot: int | None, seed: int) -> None:
    """The number of worked examples by lm-eval's own rule, and the seed that draws them."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own == 0 and num_fewshot != 0:
        logger.warning("--num-fewshot %d: ignored by %s, which fixes 0", num_fewshot, name)
    elif num_fewshot is not None or own is None:
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=_seeds(seed)[1])


def _seeds(seed: int) -> tuple[int, int]:
    """Seeds of Python, and of numpy, torch and the worked examples. At 0 they are lm-eval's
    defaults, so that its numbers come out.
    """
    defaults = importlib.import_module("lm_eval.defaults")
    return defaults.DEFAULT_RANDOM_SEED + seed, defaults.DEFAULT_OTHER_SEED + seed


def _seed(seed: int) -> None:
    first, second = _seeds(seed)
    random.seed(first)
    np.random.seed(second)
    torch.manual_seed(second)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its bars, prints, notices and worker processes, and the caller's random state
    and log level as they were.
    """
    _index()  # says so where lm-eval is not installed
    # lm-eval compiles a template again for every row
    compiled = cache(importlib.import_module("lm_eval.utils").env.from_string)
    places: tuple[tuple[str, str, Any], ...] = (
        *((module, "tqdm", no_bar) for module in ("api.task", "api.model", "models.huggingface")),
        ("api.metrics", "bootstrap_stderr", bootstrap_error),
        ("utils", "apply_template", lambda template, row: compiled(template).render(**row)),
    )
    names = [
        (vars(importlib.import_module(f"lm_eval.{module}")), name, mine)
        for module, name, mine in places
    ]
    stock = [table[name] for table, name, _ in names]
    log = logging.getLogger("lm_eval")
    level, python_state, numpy_state = log.level, random.getstate(), np.random.get_state()
    try:
        log.setLevel(logging.ERROR)
        for table, name, mine in names:
            table[name] = mine
        with torch.random.fork_rng(), no_bars():
            yield
    finally:
        for (table, name, _), theirs in zip(names, stock, strict=True):
            table[name] = theirs
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        log.setLevel(level)
