"""Method grasp-fisher: what it predicts, what it chooses, and what every switch of it does."""

import copy
import json
import re
import weakref

import pytest
import torch
from closeness import close
from conftest import LAYERS, build
from test_curvature import all_paths, brute_force, damped_gram, root

import grasp
from grasp.core.decoder import Decoder
from grasp.core.layers.low_rank_grasp import LowRankLinear
from grasp.core.runner import Resident
from grasp.errors import GraspError, RecipeError
from grasp.stages.basis import BASES, GRADIENT_DAMPING, INPUT_DAMPING
from grasp.verbs.compress import predict


@pytest.fixture
def data(calibration):
    """Two blocks are enough to choose by."""
    return grasp.Calibration(calibration.ids[:2], "random")


def run(data, model=None, **fields):
    """By ranks alone; tests/test_structure_parts.py has the other parts."""
    model = build("llama") if model is None else model
    options = {"parts": "ranks"} | fields
    return grasp.compress(model, method="grasp-fisher", data=data, **options)


def edits(result):
    return {edit["path"]: edit for edit in result.manifest["edits"]}


def ranks(result):
    return {path: edit["rank"] for path, edit in edits(result).items()}


def product(result, path):
    return result.model.get_submodule(path).product().detach().double()


def stored(result, paths):
    """Numbers that the matrices at `paths` hold now."""
    return sum(
        p.numel()
        for path in paths
        for name, p in result.model.get_submodule(path).named_parameters()
        if name != "bias"
    )


# --- the prediction


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_the_prediction_is_half_the_trace(name, calibration):
    """1/2 tr(D M X M') over all matrices: M, what was taken from W; X and D, by plain hooks. Of
    text that was not seen, more is expected.
    """
    model = build(name)
    sums = brute_force(model, calibration.ids, all_paths(Decoder(model)))
    result = run(calibration, model, ratio=0.2)
    total = undamped = 0.0
    for path, edit in edits(result).items():
        weight, inputs, gradients, tokens = sums[path]
        change = weight - product(result, path)
        x, d = inputs / tokens, gradients / tokens
        lost = (
            float(
                (
                    damped_gram(d, GRADIENT_DAMPING)
                    @ change
                    @ damped_gram(x, INPUT_DAMPING)
                    @ change.T
                ).trace()
            )
            / 2
        )
        assert edit["note"]["seen_loss"] == pytest.approx(lost, rel=1e-2, abs=1e-9), path
        assert edit["note"]["predicted_loss"] >= edit["note"]["seen_loss"] * (1 - 1e-3)
        total, undamped = total + lost, undamped + float((d @ change @ x @ change.T).trace()) / 2
    told = result.manifest["prediction"]
    assert told["seen_rise"] == pytest.approx(total, rel=1e-3)
    assert told["loss_rise"] >= total
    assert 0.6 * total < undamped < total


def test_no_loss_is_predicted_below_zero(calibration):
    """Though what is dropped may be a millionth of what is kept."""
    assert all(
        edit["note"]["predicted_loss"] >= 0
        for edit in edits(run(calibration, build("gpt2"), ratio=0.02)).values()
    )


def test_predictions_rise_with_the_ratio_and_equal_the_manifest(calibration):
    ladder = [0.01, 0.1, 0.3, 0.5]
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    found = predict(model, ladder, data=calibration, ratio=0.1, parts="ranks")
    assert list(found.rises) == ladder and list(found.rises.values()) == sorted(
        found.rises.values()
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for ratio in (0.1, 0.5):
        said = run(calibration, ratio=ratio).manifest["prediction"]
        assert (
            said["loss_rise"] == pytest.approx(found.rises[ratio], rel=1e-3)
            and said["loss_before"] == found.loss
        )
        assert said["perplexity_ratio"] * torch.tensor(found.loss).exp() == pytest.approx(
            found.perplexity(ratio), rel=1e-5
        )


def test_predictions_leave_out_what_cannot_be_reached(data):
    found = predict(build("llama"), [0.2, 0.9], data=data, ratio=0.2)
    assert list(found.rises) == [0.2]


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "shortgpt"},
        {"basis": "plain"},
        {"basis": "input"},
        {"score": "taylor"},
        {"score": "random"},
    ],
)
def test_only_losses_are_predicted(fields, data):
    with pytest.raises(RecipeError, match="predicts no loss"):
        predict(build("llama"), [0.2], data=data, ratio=0.2, **fields)
    if "method" not in fields:
        result = run(data, ratio=0.2, **fields)
        assert "prediction" not in result.manifest and not any(
            "predicted_loss" in edit["note"] for edit in result.manifest["edits"]
        )


def noisy_counting(blocks, seed, length=24):
    """x -> 3 x + 1 modulo 16, one token in eight at random."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(16, (blocks,), generator=generator)]
    for _ in range(length - 1):
        lost = torch.randint(8, (blocks,), generator=generator) == 0
        ids.append(
            torch.where(
                lost, torch.randint(16, (blocks,), generator=generator), (3 * ids[-1] + 1) % 16
            )
        )
    return torch.stack(ids, dim=1)


@pytest.fixture(scope="module")
def trained():
    """(a tiny Llama that has learnt to count, `rise(result)`: by how many nats a token its loss on
    new text rose).
    """
    model = build("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        ids = noisy_counting(32, step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    new = noisy_counting(128, 1000)

    def loss(model):
        with torch.no_grad():
            return float(model.eval()(input_ids=new, labels=new).loss)

    before = loss(model)
    assert before < 1
    return model, lambda result: loss(result.model) - before


def test_every_part_of_it_pays(trained):
    """At half the size: the Fisher basis, its score and one budget each lose several times less
    than the alternative.
    """
    model, rise = trained
    text = grasp.Calibration(noisy_counting(4, 2000, 96), "counting")

    def lost(**fields):
        return rise(run(text, copy.deepcopy(model), ratio=0.5, **fields))

    best = lost()
    assert best < 0.02
    for fields in (
        {"basis": "input"},
        {"basis": "plain"},
        {"allocation": "uniform"},
        {"score": "random"},
    ):
        assert 4 * best < lost(**fields), fields
    assert best < lost(storage="pair")


def test_the_prediction_is_of_the_right_size(trained):
    model, rise = trained
    result = run(
        grasp.Calibration(noisy_counting(4, 2000, 96), "counting"), copy.deepcopy(model), ratio=0.55
    )
    assert 0.1 < result.manifest["prediction"]["loss_rise"] / rise(result) < 10


# --- size


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt"])
def test_the_ratio_is_met_to_within_one_rank(name, data):
    """By plain pairs; tests/test_contract.py has the same for pivoted ones, on every family."""
    model = build(name)
    total = model.num_parameters()
    widest = max(sum(linear.shape) for linear in Decoder(model).linears(0))
    result = run(data, model, ratio=0.25, storage="pair")
    assert 0 <= (result.ratio - 0.25) * total + 1e-6 < widest
    assert not any(
        found.pivoted for found in result.model.modules() if isinstance(found, LowRankLinear)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", ["pair", "pivoted"])
def test_a_budget_of_bytes(storage, dtype, data):
    """All that is stored counts, the places of pivoted pairs too; met to within one rank."""
    model = build("llama", dtype)
    before = sum(p.nbytes for p in model.parameters())
    result = run(data, model, ratio=0.3, budget="bytes", storage=storage)
    after = sum(
        t.nbytes
        for t in [
            *result.model.parameters(),
            *(b for name, b in result.model.named_buffers() if "places" in name),
        ]
    )
    assert 0 <= 0.7 * before - after < dtype.itemsize * (48 + 32)


@pytest.mark.parametrize("retain", [0.0, 0.4])
def test_retain_ratio_is_a_share_of_the_chosen_matrices(retain, data):
    result = run(data, retain_ratio=retain, layers=(1, 2), projections=("mlp",))
    paths = [
        f"model.layers.{layer}.mlp.{role}_proj"
        for layer in (1, 2)
        for role in ("gate", "up", "down")
    ]
    assert ranks(result).keys() <= set(paths)
    assert 0 <= retain * 6 * 32 * 48 - stored(result, paths) < 32 + 48


def largest_ratio(data, **fields):
    """What the error for a ratio out of reach names."""
    with pytest.raises(RecipeError, match="cannot be reached") as caught:
        run(data, ratio=0.99, **fields)
    return float(re.search(r"largest reachable is (0\.\d+)", str(caught.value))[1])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"layers": (2,)},
        {"exclude": "gate,up"},
        {"budget": "bytes"},
        {"budget": "bytes", "storage": "pair"},
    ],
)
def test_the_largest_ratio_is_named_and_can_be_had(fields, data):
    """Everything at rank 0; of bytes, a pivoted pair keeps its places even then."""
    largest = largest_ratio(data, **fields)
    result = run(data, ratio=largest, **fields)
    assert set(ranks(result).values()) == {0} and result.ratio >= largest
    assert result.ratio < largest + 1e-4 or fields == {"budget": "bytes"}
    with torch.no_grad():
        assert bool(result.model(input_ids=data.ids).logits.isfinite().all())


# --- the switches


def test_each_basis_is_the_best_in_its_own_metric(data):
    """One matrix at one rank: least error of the weights, of the outputs, of the loss."""
    path = "model.layers.1.mlp.down_proj"
    weight, inputs, gradients, tokens = brute_force(build("llama"), data.ids, [path])[path]
    x_root = root(damped_gram(inputs / tokens, INPUT_DAMPING))
    d_root = root(damped_gram(gradients / tokens, GRADIENT_DAMPING))
    errors = {}
    for basis in BASES:
        result = run(data, layers=(1,), projections=("down",), retain_ratio=0.5, basis=basis)
        change = weight - product(result, path)
        errors[basis] = [
            float(e.norm()) for e in (change, change @ x_root, d_root @ change @ x_root)
        ]
    for place, basis in enumerate(("plain", "input", "fisher")):
        assert all(
            errors[basis][place] < 0.999 * errors[other][place] for other in BASES if other != basis
        )


@pytest.mark.parametrize("storage", ["pair", "pivoted"])
def test_the_plain_basis_is_the_truncated_svd(storage, data):
    result = run(data, ratio=0.3, basis="plain", storage=storage)
    dense = build("llama")
    for path, rank in ranks(result).items():
        u, s, vh = torch.linalg.svd(
            dense.get_submodule(path).weight.detach().double(), full_matrices=False
        )
        assert torch.allclose(
            product(result, path), (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-5
        ), path


@pytest.mark.parametrize("score", ["magnitude", "taylor", "random"])
def test_the_groups_with_the_best_scores_are_kept(score, data):
    for edit in edits(run(data, ratio=0.3, score=score)).values():
        assert edit["note"]["score"] == score
        best = sorted(edit["note"]["scores"], reverse=True)[: edit["rank"]]
        assert (
            sorted((edit["note"]["scores"][k] for k in edit["note"]["kept"]), reverse=True) == best
        )
        assert score != "magnitude" or edit["note"]["kept"] == list(range(edit["rank"]))


@pytest.mark.parametrize("basis", ["plain", "fisher"])
def test_taylor_is_the_first_order_change_of_the_loss(basis, data):
    """|<G, group>| of every group, with the gradient of the summed loss by autograd; the groups add
    up to <G, W>.
    """
    path = "model.layers.1.mlp.gate_proj"
    model = build("llama")
    logits = model(input_ids=data.ids, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), data.ids[:, 1:].flatten(), reduction="sum"
    ).backward()
    weight = model.get_submodule(path).weight.detach()
    grad = model.get_submodule(path).weight.grad.clone()
    found = run(
        data, layers=(1,), projections=("gate",), retain_ratio=0.0, basis=basis, score="taylor"
    )
    scores = torch.tensor(edits(found)[path]["note"]["scores"])
    if basis == "plain":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        assert torch.allclose(
            scores,
            (s * ((u.T @ grad) * vh).sum(1)).abs(),
            rtol=1e-2,
            atol=1e-4 * float(scores.max()),
        )
    assert float(scores.sum()) >= abs(float((grad * weight).sum())) * (1 - 1e-3)


def test_the_random_score_is_seeded(calibration):
    def kept(seed):
        text = grasp.Calibration(calibration.ids[:2], "random", seed)
        return {
            path: edit["note"]["kept"]
            for path, edit in edits(
                run(text, layers=(1,), retain_ratio=0.5, allocation="uniform", score="random")
            ).items()
        }

    first = kept(0)
    assert first == kept(0) != kept(1)
    assert len(set(map(tuple, first.values()))) == len(first)


def test_one_budget_beats_equal_shares(data):
    """The wider the choice, the lower the predicted loss at one size."""
    rises = [
        run(data, ratio=0.3, allocation=name).manifest["prediction"]["loss_rise"]
        for name in ("global", "per-layer", "uniform")
    ]
    assert rises[0] < 0.9 * rises[1] < 0.9 * 0.9 * rises[2]


@pytest.mark.parametrize("storage", ["pair", "pivoted"])
@pytest.mark.parametrize("allocation", ["uniform", "per-layer"])
def test_shares_are_equal_to_within_one_rank(allocation, storage, data):
    """Of every layer, or of every matrix, by the numbers stored."""
    result = run(data, ratio=0.3, allocation=allocation, storage=storage)
    linears = [
        linear for layer in Decoder(build("llama")).layers() for linear in layer.linears.values()
    ]
    share = 1 - 0.3 * result.parameters_before / sum(linear.weight.numel() for linear in linears)
    parts = {}
    for linear in linears:
        parts.setdefault(linear.layer if allocation == "per-layer" else linear.path, []).append(
            linear
        )
    for part in parts.values():
        spent = stored(result, [linear.path for linear in part])
        dense = sum(linear.weight.numel() for linear in part)
        assert abs(spent - share * dense) < max(sum(linear.shape) for linear in part)


def test_layers_by_block_influence(data):
    result = run(data, ratio=0.1, layers="bi", num_layers=2)
    influence = result.manifest["redundancy"]["bi"]
    assert {path.split(".")[2] for path in ranks(result)} == set(
        sorted(influence, key=influence.get)[:2]
    )


def test_no_layers_is_no_edits(data):
    assert run(data, retain_ratio=0.5, layers="bi", num_layers=0).manifest["edits"] == []


def test_layers_by_index(data):
    result = run(data, ratio=0.1, layers=("0", "3"))
    assert {path.split(".")[2] for path in ranks(result)} == {"0", "3"}
    assert ranks(run(data, ratio=0.1, layers=(0, 3))) == ranks(result)


@pytest.mark.parametrize(
    ("fields", "roles"),
    [
        ({"projections": ("attention",)}, "q k v o"),
        ({"projections": "gate,down_proj"}, "gate down"),
        ({"exclude": ("k", "v")}, "q o gate up down"),
        ({"exclude": "attention,up"}, "gate down"),
        ({"projections": "mlp", "exclude": "gate"}, "up down"),
    ],
)
def test_projections_and_exclude(fields, roles, data):
    """At rank 0 everything chosen is replaced, and the rest is dense and untouched."""
    result, dense = run(data, retain_ratio=0.0, **fields), build("llama")
    assert {path.split(".")[-1] for path in ranks(result)} == {
        f"{role}_proj" for role in roles.split()
    }
    assert set(ranks(result).values()) == {0} and len(ranks(result)) == LAYERS * len(roles.split())
    for path in set(all_paths(Decoder(dense))) - ranks(result).keys():
        assert torch.equal(
            result.model.get_submodule(path).weight, dense.get_submodule(path).weight
        )


@pytest.mark.parametrize("multiple", [4, 16])
def test_rank_multiple(multiple, calibration):
    result = run(calibration, ratio=0.3, rank_multiple=multiple)
    assert {rank % multiple for rank in ranks(result).values()} == {0} and any(
        ranks(result).values()
    )
    assert 0.3 <= result.ratio < 0.3 + multiple * (32 + 48) / result.parameters_before


def test_storage_changes_the_size_not_the_product(data):
    """One matrix at one rank, stored either way."""
    path, found = "model.layers.1.mlp.gate_proj", {}
    for storage, retain in (("pair", 10 * (32 + 48)), ("pivoted", 10 * (32 + 48 - 10))):
        found[storage] = run(
            data,
            layers=(1,),
            projections=("gate",),
            retain_ratio=retain / (32 * 48),
            storage=storage,
        )
        assert ranks(found[storage]) == {path: 10} and stored(found[storage], [path]) == retain
    assert torch.allclose(product(found["pair"], path), product(found["pivoted"], path), atol=1e-5)


def test_scratch_files_change_nothing(data, tmp_path):
    plain, on_disk = run(data, ratio=0.3), run(data, ratio=0.3, scratch=str(tmp_path))
    assert plain.manifest["edits"] == on_disk.manifest["edits"] and not list(tmp_path.iterdir())
    assert "scratch" not in json.dumps(on_disk.manifest["recipe"])


def test_a_bfloat16_model(data):
    wide, narrow = run(data, ratio=0.3), run(data, build("llama", torch.bfloat16), ratio=0.3)
    assert {p.dtype for p in narrow.model.parameters()} == {torch.bfloat16}
    rises = [result.manifest["prediction"]["loss_rise"] for result in (wide, narrow)]
    assert rises[1] == pytest.approx(rises[0], rel=0.1)


# --- how it runs


def test_the_same_edits_on_one_thread_or_three(data, monkeypatch):
    """The same decisions, and weights that differ by the order of sums only."""
    results = [run(data, ratio=0.3)]
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    results.append(run(data, ratio=0.3))
    torch.set_num_threads(threads)
    one, three = results
    assert [
        (edit["path"], edit["rank"], edit["note"]["kept"]) for edit in one.manifest["edits"]
    ] == [(edit["path"], edit["rank"], edit["note"]["kept"]) for edit in three.manifest["edits"]]
    for path, edit in edits(one).items():
        assert edits(three)[path]["note"]["predicted_loss"] == pytest.approx(
            edit["note"]["predicted_loss"], rel=1e-3
        ), path
        assert close(product(three, path).float(), product(one, path).float(), roundings=10_000), (
            path
        )


def test_it_reads_the_text_once(data):
    model, seen = build("llama"), []
    model.base_model.register_forward_hook(lambda *_: seen.append(1))
    run(data, model, ratio=0.3)
    assert len(seen) == data.num_blocks


def test_a_compressed_model_is_compressed_further(data, caplog):
    """With a warning about the matrices that are pairs already and stay as they are."""
    first = run(data, layers=(1,), ratio=0.1)
    before = {
        name: value.clone()
        for name, value in first.model.state_dict().items()
        if ".layers.1." in name
    }
    second = run(data, first.model, ratio=0.1)
    assert "layer 1" in caplog.text and "already" in caplog.text
    assert (
        second.ratio == pytest.approx(0.1, abs=0.003)
        and not ranks(first).keys() & ranks(second).keys()
    )
    assert all(
        torch.equal(value, before[name])
        for name, value in second.model.state_dict().items()
        if name in before and name in first.manifest
    )


def test_nothing_left_to_choose(data):
    assert run(data, retain_ratio=0.5, exclude=("all",)).manifest["edits"] == []


WRONG = {
    "none was given": {},
    "got --ratio and --retain-ratio": {"ratio": 0.2, "retain_ratio": 0.2},
    "--ratio 1: must be at least 0 and below 1": {"ratio": 1},
    "--ratio nan": {"ratio": float("nan")},
    "--retain-ratio -0.5: must be at least 0": {"retain_ratio": -0.5},
    "--basis fischer.*plain, input, fisher.*did you mean 'fisher'": {
        "ratio": 0.2,
        "basis": "fischer",
    },
    "--score magnitud.*did you mean 'magnitude'": {"ratio": 0.2, "score": "magnitud"},
    "--allocation layer.*uniform, per-layer, global": {"ratio": 0.2, "allocation": "layer"},
    "--budget param.*did you mean 'params'": {"ratio": 0.2, "budget": "param"},
    "--storage pivot.*did you mean 'pivoted'": {"ratio": 0.2, "storage": "pivot"},
    "--rank-multiple 0: must be a whole number from 1 to": {"ratio": 0.2, "rank_multiple": 0},
    "--layers some: allowed: all, bi, or indices": {"ratio": 0.2, "layers": "some"},
    "--layers all,1: allowed": {"ratio": 0.2, "layers": "all,1"},
    "--layers -1: allowed": {"ratio": 0.2, "layers": (-1,)},
    "--layers 1,1: .*none twice": {"ratio": 0.2, "layers": "1,1"},
    "--layers 1,1: name at least one layer, and none twice": {"ratio": 0.2, "layers": "1,01"},
    "--layers ²: allowed": {"ratio": 0.2, "layers": "²"},
    "--layers : name at least one layer": {"ratio": 0.2, "layers": ()},
    "--num-layers and --layers bi go together": {"ratio": 0.2, "layers": "bi"},
    "--layers bi go together": {"ratio": 0.2, "num_layers": 2},
    "--num-layers -1: must be a whole number from 0 to": {
        "ratio": 0.2,
        "layers": "bi",
        "num_layers": -1,
    },
    "--num-layers 5: the model has 4 layers": {"ratio": 0.2, "layers": "bi", "num_layers": 5},
    "--layers 4: the model has layers 0 to 3": {"ratio": 0.2, "layers": "4"},
    "--exclude: 'gaet' is no matrix.*did you mean 'gate'": {"ratio": 0.2, "exclude": "gaet"},
    "--projections: 'gaet' is no matrix": {"ratio": 0.2, "projections": "gaet"},
    "--angular: not a flag of --method grasp-fisher; it belongs to grasp": {
        "ratio": 0.2,
        "angular": True,
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_one_line(message, data):
    with pytest.raises(GraspError, match=message) as caught:
        run(data, **WRONG[message])
    assert "\n" not in str(caught.value)


def test_statistics_are_gone_when_they_are_measured_anew(data, monkeypatch):
    """Two rounds hold one set of sums at a time."""
    held = []

    def sweep(self, collectors, what, whole=Resident.sweep):
        assert not any(one() for one in held)
        found = whole(self, collectors, what)
        held.extend(map(weakref.ref, [found, *collectors]))
        return found

    monkeypatch.setattr(Resident, "sweep", sweep)
    done = run(data, parts="channels,ranks", ratio=0.3, width_multiple=4)
    assert len(held) == 7
    assert {entry.edit.kind for entry in done.log} == {"narrow", "factorize"}
