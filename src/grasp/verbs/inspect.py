"""`grasp inspect`: how redundant every layer is, and how fast the singular values of its matrices
fall. Nothing is changed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from grasp.core.edits.slicing import check_unsliced
from grasp.core.linalg import svd
from grasp.core.models import open_model
from grasp.core.progress import Progress, silent
from grasp.core.records import Calibration, Redundancy
from grasp.core.runner import Resident
from grasp.data.calibration import calibrate
from grasp.recipes.calibration import InspectionRecipe
from grasp.recipes.keywords import keywords
from grasp.recipes.model import ModelSource
from grasp.stages.redundancy import angular_distance, block_influence
from grasp.stages.statistics import AngularDistance, Similarity


@dataclass(frozen=True)
class Inspection:
    """What `inspect` saw: redundancy of the layers, and the singular values (k,) of every matrix by
    path.
    """

    redundancy: Redundancy
    singular_values: dict[str, Tensor]
    calibration: Calibration


@keywords
def inspect(
    source: ModelSource,
    *,
    recipe: InspectionRecipe,
    spectra: bool = True,
    progress: Progress = silent,
) -> Inspection:
    """Layer redundancy and, unless `spectra` is False, singular values; nothing is changed."""
    decoder = open_model(**vars(source), dequantize=True)
    check_unsliced(decoder, "what its layers read and hand on cannot be compared")
    decoder.check_finite()
    blocks = {name: value for name, value in vars(recipe).items() if name != "angular"}
    calibration = calibrate(decoder, **blocks, progress=progress)
    decoder.progress = progress
    runner = Resident(decoder, calibration)
    collectors = [AngularDistance()] if recipe.angular else [Similarity()]
    stats = runner.sweep(collectors, "layer redundancy")
    linears = (
        [linear for layer in decoder.layers() for linear in layer.linears.values()]
        if spectra
        else []
    )
    values = {}
    for done, linear in enumerate(linears):
        progress("singular values", done, len(linears))
        with runner.holding(linear.layer):
            values[linear.path] = svd(linear.weight)[1].cpu()
    progress("singular values", len(linears), len(linears))
    return Inspection(
        angular_distance(stats) if recipe.angular else block_influence(stats), values, calibration
    )
