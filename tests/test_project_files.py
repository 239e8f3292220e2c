"""Files that GitHub, pre-commit and people who cite read: they parse, and name what is there."""

import re
from pathlib import Path

import pytest
import yaml

import grasp

ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.MULTILINE))


def read(path: Path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def unknown_targets(text: str) -> list[str]:
    """Targets of `make` commands that the Makefile lacks."""
    named = re.findall(r"(?:^|[`;&]\s*|run: )make ([a-z][\w-]*)", text, re.MULTILINE)
    return [name for name in named if name not in TARGETS]


def pinned(name: str) -> str:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return re.findall(rf"^{name}==(\S+)$", constraints, re.MULTILINE)[0]


def test_the_workflow_runs_the_tests_on_what_is_promised():
    workflow = read(ROOT / ".github" / "workflows" / "test.yml")
    [job] = workflow["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert any(command.startswith("make test ") for command in commands)
    assert any(command.startswith("make check ") for command in commands)
    assert job["strategy"]["matrix"]["os"] == ["ubuntu-latest", "macos-latest"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lowest = re.findall(r'^requires-python = ">=(.*)"', project, re.MULTILINE)
    assert job["strategy"]["matrix"]["python"] == [*lowest, "3.11", "3.12", "3.13"]
    assert f"torch=={pinned('torch')}" in "".join(commands)
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize(
    "name",
    [
        ".github/workflows/test.yml",
        ".github/pull_request_template.md",
        ".pre-commit-config.yaml",
        "README.md",
        "CONTRIBUTING.md",
        "docs/guide.md",
        "docs/serving.md",
    ],
)
def test_every_make_command_has_its_target(name):
    assert unknown_targets((ROOT / name).read_text(encoding="utf-8")) == []


def test_an_unknown_target_is_found():
    assert unknown_targets("run: make nothing PYTHON=python\nmake test\n`make else`") == [
        "nothing",
        "else",
    ]


def test_pre_commit_runs_the_pinned_ruff_where_make_check_does():
    [ruff] = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert ruff["rev"] == f"v{pinned('ruff')}"
    assert {hook["id"] for hook in ruff["hooks"]} == {"ruff-check", "ruff-format"}
    [folders] = re.findall(r"ruff check (.*)$", MAKEFILE, re.MULTILINE)
    for hook in ruff["hooks"]:
        assert hook["files"] == f"^({'|'.join(folders.split())})/"


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_forms(form):
    found = read(form)
    if form.stem == "config":
        assert found == {"blank_issues_enabled": True}
        return
    assert found["name"] and found["description"]
    kinds = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    assert {field["type"] for field in found["body"]} <= kinds
    ids = [field["id"] for field in found["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids))
    assert any(field.get("validations", {}).get("required") for field in found["body"])


def test_there_are_forms_for_faults_and_for_models():
    assert {"bug", "model", "config"} <= {form.stem for form in FORMS}


def test_the_citation_is_of_this_version_and_of_the_paper():
    """The keys that the Citation File Format 1.2.0 requires, and no date where none is known."""
    found = read(ROOT / "CITATION.cff")
    assert found["cff-version"] == "1.2.0"
    assert found["message"] and found["title"] and found["authors"]
    assert found["version"] == grasp.__version__
    assert found["license"] == "Apache-2.0"
    [paper] = found["references"]
    assert paper["type"] == "article" and "2501.00339" in paper["url"]
    assert [one["family-names"] for one in paper["authors"]] == [
        "Liu",
        "Zhang",
        "Cheng",
        "Li",
        "Wang",
        "Xiao",
    ]
