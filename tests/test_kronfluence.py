"""Our Kronecker factors beside those of kronfluence (Grosse et al., arXiv 2308.03296), which
collects them by code of its own.

Needs kronfluence, which `make test-tasks` installs.
"""

import pytest
import torch
from conftest import build
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from grasp.core.decoder import Decoder
from grasp.core.records import Calibration
from grasp.core.runner import Resident
from grasp.stages.curvature import Curvatures

kronfluence = pytest.importorskip("kronfluence", reason="needs kronfluence: make test-tasks")


class Blocks(Dataset):
    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index]}


def factors_of(model, paths, ids, folder):
    """(sum of x x', sum of d d') by path, of kronfluence."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class NextToken(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
            labels = batch["input_ids"][:, 1:]
            return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

        compute_measurement = compute_train_loss

        def get_influence_tracked_modules(self):
            return paths

    task = NextToken()
    analyzer = Analyzer(
        "tiny",
        prepare_model(model, task),
        task,
        cpu=True,
        output_dir=str(folder),
        disable_tqdm=True,
        disable_model_save=True,
    )
    analyzer.fit_covariance_matrices(
        "factors",
        Blocks(ids),
        per_device_batch_size=1,
        # the text's own labels, as ours
        factor_args=FactorArguments(use_empirical_fisher=True),
    )
    found = analyzer.load_covariance_matrices("factors")
    return found["activation_covariance"], found["gradient_covariance"]


def test_the_factors_are_those_of_kronfluence(tmp_path):
    ids = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(build("llama"))
    linears = [one for layer in decoder.layers() for one in layer.linears.values()]
    weights = {one.path: one.weight.clone() for one in linears}
    tall = {one.path: one.is_tall for one in linears}
    data = Calibration(ids, "random")
    table = Resident(decoder, data).sweep([Curvatures(list(weights))])[Curvatures.name]
    inputs, gradients = factors_of(decoder.model, list(weights), ids, tmp_path)
    for path, weight in weights.items():
        x, d = inputs[path].float(), gradients[path].float()
        # of the shorter side: X itself, and W'DW
        expected = (x, weight.T @ d @ weight) if tall[path] else (d, weight @ x @ weight.T)
        for found, wanted in zip((table[path].near, table[path].far), expected, strict=True):
            scale = float(wanted.abs().max())
            torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-5 * scale)
