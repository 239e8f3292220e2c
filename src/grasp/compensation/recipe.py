"""The recipe of a compensation: every field is a flag of `grasp recover`, an argument of
`grasp.recover` and a line of the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from grasp.core.fields import (
    BatchSize,
    Count,
    CountFrom0,
    Place,
    Seed,
    SeqLen,
    Share,
    check,
    check_fields,
    declared,
    flag,
    named,
)
from grasp.errors import RecipeError, did_you_mean

TRAIN = ("factors", "layers", "lora")
LORA_ON = ("matrices", "output-factors", "input-factors")
OBJECTIVES = ("lm", "distill", "layer", "block")
STARTS = ("keep", "least-squares")
SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("auto", "bfloat16", "float32")
Rank = Annotated[int, Meta(ge=1, le=65_536)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. The defaults are the paper's (section 4.1 and its table of hyperparameters),
    except that what is trained are the factors.
    """

    train: str = flag(
        "factors",
        "What is trained: the factors of low-rank matrices and narrowed ones; all of their layers"
        " (of a model with layers removed: all that are left); or LoRA adapters on every matrix,"
        " merged at the end.",
        words=TRAIN,
    )
    objective: str = flag(
        "lm",
        "lm: cross-entropy of the answers. distill: KL divergence from the dense model's"
        " predictions. layer: the dense model's hidden states behind every edited layer. block: the"
        " same, one layer after the other, each on what the compressed model shows it.",
        words=OBJECTIVES,
    )
    start: str | None = flag(
        None,
        "keep: the factors as they are. least-squares: output factors solved for the dense outputs"
        " first. Default: least-squares for --objective layer, else keep.",
        words=STARTS,
    )
    teacher: Place | None = flag(
        None,
        "The dense MODEL for distill, layer, block and least-squares. Default: the model that was"
        " compressed.",
    )
    temperature: Annotated[float, Meta(ge=0.01, le=1_000)] = flag(
        1.0, "[distill] Softens both predictions."
    )
    lm_weight: Annotated[float, Meta(ge=0, le=1)] = flag(
        0.0, "[distill] Share of the answers' cross-entropy in the loss, 0 to 1."
    )
    teacher_cache: Place | None = flag(
        None,
        "[distill] Folder that keeps the teacher's most likely tokens: computed once, read by every"
        " later run on the same rows.",
        recipe=False,
    )
    top_k: Rank = flag(
        64, "[distill] Tokens a position that --teacher-cache keeps; the rest counts as one."
    )
    offload_teacher: bool = flag(
        False,
        "[distill, layer] Keep the teacher's weights outside the device and bring them in layer by"
        " layer.",
        recipe=False,
    )
    offload: Place | None = flag(
        None,
        "[block] Leave the decoder layers of both models on the disk, and the states of the text in"
        " this folder: one layer is in memory.",
        recipe=False,
    )
    lora_on: str = flag(
        "matrices",
        "[lora] What gets adapters: matrices (all that are dense; low-rank pairs are trained as"
        " they are), or of every low-rank pair the output-factors or the input-factors, all else"
        " being frozen.",
        words=LORA_ON,
    )
    lora_rank: Rank = flag(256, "[lora] Rank of the adapters.")
    lora_alpha: Rank = flag(16, "[lora] Scale of the adapters, over their rank.")
    lora_dropout: Share = flag(0.05, "[lora] Dropout in front of the adapters.")
    keep_adapter: bool = flag(
        False,
        "[lora] Do not merge: OUT is the checkpoint as it was, OUT/adapter a peft adapter for it.",
    )
    epochs: Annotated[float, Meta(gt=0, le=1_000)] = flag(1.0, "Passes over the data.")
    max_steps: Annotated[int, Meta(ge=1, le=10_000_000)] | None = flag(
        None, "Stop after so many steps; of several texts each then gives an equal share."
    )
    batch_size: BatchSize = flag(32, "Rows a step, over all processes.")
    micro_batch: BatchSize = flag(
        4, "Rows at once on one device; the rest of a batch is accumulated.", recipe=False
    )
    learning_rate: Annotated[float, Meta(gt=0, le=10)] | None = flag(
        3e-4,
        "Highest learning rate of AdamW. With --preset quick: 1e-3, or 1e-4 where a tenth of all"
        " numbers or more is trained.",
    )
    warmup_steps: CountFrom0 = flag(100, "Steps until it is reached; at most a tenth of all.")
    schedule: str = flag("linear", "What follows the warm-up.", words=SCHEDULES)
    weight_decay: Annotated[float, Meta(ge=0, le=10)] = flag(0.0, "AdamW's weight decay.")
    max_grad_norm: Annotated[float, Meta(ge=0, le=1e6)] = flag(
        1.0, "Longest gradient; 0: no limit."
    )
    max_length: SeqLen = flag(
        256, "Tokens of a row. Longer answers are cut, longer texts go on in the next row."
    )
    pad: bool = flag(
        False, "One example a row, padded. Default: several, packed, which do not see one another."
    )
    held_out: Count = flag(
        64, "Examples (or rows of text) kept out of training, whose loss is watched."
    )
    eval_every: Count | None = flag(
        None,
        "Steps between looks at the held-out loss, each of which saves the state too. Default: a"
        " tenth of all.",
    )
    precision: str = flag(
        "auto",
        "bfloat16: products in bfloat16, trained weights in float32. auto: where the device"
        " has it.",
        words=PRECISIONS,
    )
    gradient_checkpointing: bool = flag(
        False, "Less memory for activations, about a third more time.", recipe=False
    )
    seed: Seed = flag(0, "Draws the held-out examples, the order and the adapters' start.")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.keep_adapter and self.train != "lora":
            raise RecipeError(
                f"--keep-adapter: --train {self.train} makes no adapter; leave it out or use"
                " --train lora"
            )
        if self.lora_on != "matrices" and self.train != "lora":
            raise RecipeError(
                f"--lora-on {self.lora_on}: --train {self.train} makes no adapter; leave it out or"
                " use --train lora"
            )
        if self.lora_on != "matrices" and self.keep_adapter:
            raise RecipeError(
                f"--keep-adapter: adapters on {self.lora_on} are always merged; leave it out"
            )
        if self.lora_on != "matrices" and self.lora_dropout:
            raise RecipeError(
                f"--lora-dropout {self.lora_dropout}: adapters on {self.lora_on} change numbers,"
                " and have no input to drop; give 0, or use --preset sequential"
            )
        if self.offload is not None and self.objective != "block":
            raise RecipeError(
                f"--offload {self.offload}: --objective {self.objective} needs all layers at once;"
                " --objective block trains one after the other"
            )
        if self.objective == "block" and self.train == "lora":
            raise RecipeError(
                "--train lora: --objective block trains weights as they are; use --train factors or"
                " layers"
            )
        if self.objective == "block" and self.begins == "least-squares":
            raise RecipeError(
                "--start least-squares: --objective block finds each layer's weights by itself;"
                " leave it out"
            )
        if self.teacher_cache is not None and self.objective != "distill":
            raise RecipeError(
                f"--teacher-cache: --objective {self.objective} reads no teacher's predictions; it"
                " belongs to --objective distill"
            )
        if self.lm_weight and self.objective != "distill":
            raise RecipeError(
                f"--lm-weight {self.lm_weight}: only --objective distill mixes two losses"
            )

    @property
    def begins(self) -> str:
        """`start`, or what it defaults to."""
        return self.start or ("least-squares" if self.objective == "layer" else "keep")

    @property
    def needs_teacher(self) -> bool:
        return self.objective != "lm" or self.begins == "least-squares"

    def flags(self) -> list[str]:
        """The words of a command line that make this recipe: the fields that are not at their
        defaults.
        """
        words = []
        for one in declared(type(self)).values():
            value = getattr(self, one.name)
            if value != one.default and value is not None:
                words += [one.flag] if value is True else [one.flag, str(value)]
        return words

    def to_json(self) -> dict[str, Any]:
        """The fields that decide the result."""
        values = {
            one.name: getattr(self, one.name) for one in declared(type(self)).values() if one.recipe
        }
        return {**values, "start": self.begins}


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "quick": {
        "objective": "distill",
        "batch_size": 4,
        "learning_rate": None,
        "warmup_steps": 20,
        "held_out": 16,
    },
    "sequential": {
        "train": "lora",
        "lora_on": "output-factors",
        "lora_rank": 8,
        "lora_dropout": 0.0,
        "epochs": 3.0,
        "batch_size": 64,
        "learning_rate": 1e-4,
    },
}
"""`paper`: the defaults. `quick`: what brought back most in twenty minutes on two cores
(docs/recovery.md). Its learning rate is settled by the share of the model that is trained
(`grasp.compensation.trainable.settled`). `sequential`: half of a sequential low-rank update (arXiv
2403.07378, ICLR 2025, as its published script has it, but without dropout): output factors by
adapters of small rank. The other half is the same once more with `lora_on` "input-factors", on what
the first one wrote.
"""


def make_recipe(preset: str | None, fields: dict[str, Any]) -> Recipe:
    """The recipe of a preset with some fields changed. Raises `RecipeError` for an unknown preset,
    field or value.
    """
    if preset is not None and preset not in PRESETS:
        raise RecipeError(
            f"--preset {preset}: unknown; allowed:"
            f" {', '.join(PRESETS)}{did_you_mean(preset, PRESETS)}"
        )
    known = declared(Recipe)
    for name in fields:
        if name not in known:
            raise RecipeError(
                f"{named(name)}: grasp recover has no such field{did_you_mean(name, known)}"
            )
    given = {name: check(name, value, known[name].kind) for name, value in fields.items()}
    return Recipe(**{**PRESETS[preset or "paper"], **given})
