"""The seal: a checkpoint that is not as it was written says so at every load, and `grasp verify`
finds every change.
"""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import grasp
from grasp import cli
from grasp.core.seal import SEAL
from grasp.terminal import ending


@pytest.fixture(scope="module")
def written(tmp_path_factory, model_directory):
    """A checkpoint as grasp wrote it."""
    out = tmp_path_factory.mktemp("sealed") / "out"
    ids = torch.randint(0, 256, (4, 20), generator=torch.Generator().manual_seed(1))
    grasp.compress(
        model_directory, out, method="grasp", layers=(1,), data=grasp.Calibration(ids, "random")
    )
    return out


@pytest.fixture
def copy(written, tmp_path):
    """One that may be changed."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def set_field(file: Path, *keys: str, value: object) -> None:
    found = json.loads(file.read_text())
    inner = found
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    file.write_text(json.dumps(found))


def warnings_of(caplog, place: Path) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "grasp"):
        grasp.load(place)
    return [
        record.getMessage()
        for record in caplog.records
        if "changed after it was written" in record.getMessage()
    ]


def test_every_file_is_sealed(written):
    files = json.loads((written / "grasp.json").read_text())[SEAL]["files"]
    assert set(files) == {path.name for path in written.iterdir()} - {"grasp.json"}
    assert files["config.json"]["values"]["rms_norm_eps"] == 1e-6


def test_what_was_not_changed_is_not_warned_of(copy, caplog):
    (copy / "README.md").write_text("# mine\n")
    (copy / "results.json").write_text("{}")
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert warnings_of(caplog, copy) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda p: set_field(p / "config.json", "rms_norm_eps", value=0.1),
            "config.json: rms_norm_eps is 0.1, was 1e-06",
        ),
        (
            lambda p: set_field(p / "config.json", "rope_parameters", "rope_theta", value=5000),
            "config.json: rope_parameters.rope_theta is 5000, was 10000.0",
        ),
        (
            lambda p: set_field(p / "config.json", "new", value=True),
            "config.json: new is true, was not there",
        ),
        (
            lambda p: set_field(p / "generation_config.json", "eos_token_id", value=3),
            "generation_config.json: eos_token_id is 3, was 257",
        ),
        (
            lambda p: set_field(p / "grasp.json", "parameters", "after", value=1),
            "grasp.json: is not as it was written",
        ),
        (
            lambda p: (p / "config.json").write_text((p / "config.json").read_text() + " "),
            "config.json: is not as it was written",
        ),
        (
            lambda p: (p / "tokenizer.json").write_text(
                (p / "tokenizer.json").read_text().replace('"<pad>"', '"<PAD>"')
            ),
            "tokenizer.json: is not as it was written",
        ),
        (
            lambda p: (p / "chat_template.jinja").write_text("hello"),
            "chat_template.jinja: is not as it was written",
        ),
        (lambda p: (p / "generation_config.json").unlink(), "generation_config.json: is gone"),
        (
            lambda p: (p / "added_tokens.json").write_text("{}"),
            "added_tokens.json: was not there when it was written",
        ),
    ],
)
def test_a_change_is_one_warning_that_names_file_and_field(copy, caplog, change, said):
    change(copy)
    [warning] = warnings_of(caplog, copy)
    assert said in warning and str(copy) in warning


def test_many_changes_are_still_one_short_warning(copy, caplog):
    for number in range(20):
        set_field(copy / "config.json", f"field_{number}", value="x" * 200)
    (copy / "generation_config.json").unlink()
    [warning] = warnings_of(caplog, copy)
    assert (
        "and 15 more fields" in warning
        and "generation_config.json: is gone" in warning
        and len(warning) < 900
    )


def verify(place: Path, *flags: str):
    return CliRunner().invoke(cli.cli, ["verify", str(place), "--quiet", *flags])


def test_verify_says_when_nothing_differs(written):
    done = verify(written, "--json")
    assert done.exit_code == 0
    said = json.loads(done.stdout.splitlines()[-1])
    assert (
        said["same"]
        and said["differences"] == []
        and said["bytes"] > (written / "model.safetensors").stat().st_size
    )


def test_verify_finds_two_tensors_of_one_shape_that_changed_places(copy):
    tensors = load_file(copy / "model.safetensors")
    one, other = (f"model.layers.{index}.mlp.down_proj.weight" for index in (0, 2))
    tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    seen = grasp.verify(copy)
    assert [(one.file, one.kind) for one in seen.differences] == [("model.safetensors", "changed")]
    assert verify(copy).exit_code == 1


def test_verify_names_what_is_gone_and_what_was_added(copy):
    (copy / "tokenizer.json").unlink()
    (copy / "notes.txt").write_text("x")
    (copy / "adapter").mkdir()
    (copy / "adapter" / "adapter_config.json").write_text("{}")
    done = verify(copy, "--json")
    found = {
        one["file"]: one["kind"] for one in json.loads(done.stdout.splitlines()[-1])["differences"]
    }
    assert done.exit_code == 1
    assert found == {
        "tokenizer.json": "missing",
        "notes.txt": "surplus",
        "adapter/adapter_config.json": "surplus",
    }


def test_an_edited_card_is_a_note(copy):
    (copy / "README.md").write_text("# mine\n")
    done = verify(copy, "--json")
    said = json.loads(done.stdout.splitlines()[-1])
    assert (
        done.exit_code == 0
        and said["same"]
        and said["notes"] == ["README.md: edited, which only people read"]
    )


def test_the_exit_status_reaches_the_shell(copy, monkeypatch):
    (copy / "notes.txt").write_text("x")
    monkeypatch.setattr(sys, "argv", ["grasp", "verify", str(copy), "--quiet"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 1


def unsealed(place: Path) -> None:
    manifest = json.loads((place / "grasp.json").read_text())
    del manifest[SEAL]
    (place / "grasp.json").write_text(json.dumps(manifest))


def test_a_checkpoint_without_a_seal_loads_and_cannot_be_verified(copy, caplog):
    unsealed(copy)
    set_field(copy / "config.json", "rms_norm_eps", value=0.1)
    assert warnings_of(caplog, copy) == []
    with pytest.raises(grasp.GraspError, match="written before grasp kept hashes"):
        grasp.verify(copy)


@pytest.mark.parametrize(
    "seal",
    [
        [],
        {},
        {"manifest": 1, "files": {}},
        {"manifest": "", "files": {"config.json": {"bytes": "many"}}},
    ],
)
def test_a_damaged_seal_is_said(copy, seal):
    set_field(copy / "grasp.json", SEAL, value=seal)
    for look in (grasp.load, grasp.verify):
        with pytest.raises(grasp.GraspError, match=r"grasp.json: seal: .*damaged"):
            look(copy)


def test_what_grasp_did_not_write_is_refused(model_directory, tmp_path):
    for place in (model_directory, tmp_path / "nowhere"):
        with pytest.raises(grasp.GraspError, match="give a checkpoint that grasp wrote"):
            grasp.verify(place)


def test_what_is_made_of_a_checkpoint_bears_its_own_seal(written, tmp_path):
    """Edited again, saved again: nothing of the first seal is left."""
    from grasp.core.checkpoint import save
    from grasp.core.manifest import read_manifest
    from grasp.core.models import load_model

    save(load_model(str(written)), tmp_path / "again", read_manifest(written), "# another card\n")
    assert grasp.verify(tmp_path / "again").same


def test_a_warning_is_said_once_a_run(capsys):
    handler = ending._ToStderr()
    for message in ("one", "one", "two"):
        handler.handle(logging.LogRecord("grasp", logging.WARNING, "", 0, message, None, None))
    assert capsys.readouterr().err.split() == ["one", "two"]
