"""What a newcomer reads first: the README's program runs, every link leads somewhere, every method
is named.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from grasp.methods import available

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md", ".github/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]
WIDEST = 100


def without_code(text: str) -> str:
    """Markdown without what stands in fences and between backticks."""
    return re.sub(
        r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    )


def programs(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def links(text: str) -> list[str]:
    """Targets of links and pictures, those of reference links too."""
    bare = without_code(text)
    inline = re.findall(r"\]\(<?([^)>\s]+)>?[^)]*\)", bare)
    return inline + re.findall(r"^\[[^\]]+\]:\s+<?(\S+?)>?$", bare, flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The headings of a page, as GitHub makes anchors of them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {
        re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings
    }


def dead(page: Path) -> list[str]:
    """Relative links of a page to a file, or a heading of one, that is not there."""
    found = []
    for link in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        is_page = target.suffix == ".md" and target.is_file()
        if not target.exists() or (
            anchor and is_page and anchor not in anchors(target.read_text(encoding="utf-8"))
        ):
            found.append(link)
    return found


@pytest.fixture
def long_model(model_directory, tmp_path) -> str:
    """The tiny model, reading as many tokens at once as the README's defaults ask for."""
    path = tmp_path / "tiny-llama"
    shutil.copytree(model_directory, path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 512
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(path)


def test_the_program_of_the_readme_runs(long_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [program] = programs(README)
    lines = [line for line in program.splitlines() if line and not line.startswith("#")]
    assert len(lines) == 6
    assert '"smollm2"' in program
    names: dict = {}
    exec(program.replace('"smollm2"', repr(long_model)), names)
    before, after = names["result"].parameters_before, names["result"].parameters_after
    assert abs((1 - after / before) - 0.2) < 0.02
    sizes, perplexity, kind = capsys.readouterr().out.splitlines()
    assert sizes == f"{before} -> {after}"
    assert float(perplexity) > 1
    assert kind == "LlamaForCausalLM"
    assert (tmp_path / "small" / "grasp.json").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    assert dead(page) == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# A heading\n")
    (tmp_path / "page.md").write_text(
        "[a](gone.md) ![b](gone.png) [c](there.md#a-heading) [d](there.md#no-heading)\n"
        "[e](https://example.org) `[f](code.md)` [g][h]\n\n[h]: lost.md\n```\n[i](fence.md)\n```\n"
    )
    found = ["gone.md", "gone.png", "there.md#no-heading", "lost.md"]
    assert dead(tmp_path / "page.md") == found


def test_lines_of_the_readme_fit_a_terminal():
    assert [line for line in README.splitlines() if len(line) > WIDEST] == []


@pytest.mark.parametrize("method", sorted(available()))
def test_the_readme_names_every_method(method):
    assert f"\n| `{method}` |" in README


def test_the_readme_has_the_two_commands_that_begin():
    assert re.search(r"^make demo\b", README, re.MULTILINE)
    assert re.search(r"^make test\b", README, re.MULTILINE)
