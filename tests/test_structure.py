"""The rules of the layout (CONTRIBUTING.md): who may import whom, who may change a model, what a
file may hold.
"""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "grasp"
FILES = {
    path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8")
    for path in SOURCE.rglob("*.py")
}

MAY_IMPORT = {
    "errors": "",
    "_register": "core.layers.modeling_grasp",
    "core": "core errors",
    "data": "core data errors",
    "stages": "core data stages errors",
    "methods": (
        "core data stages methods.base methods.bits methods.components methods.costs methods.dial"
        " methods.low_rank methods.parts methods.rounding"
        " methods.plugin methods.scope methods.size methods.sparse methods.structure methods.widths"
        " errors"
    ),
    "evaluation": "core data evaluation errors",
    "report": "core data report errors",
    "serving": "core data serving errors",
    "compensation": "core data compensation errors",
    "recipes": "core.compressed_tensors core.fields core.sizes recipes errors",
    "recipes/cell": "core.fields methods recipes errors",
    "recipes/experiment": "core methods compensation.recipe recipes errors",
    "verbs": "core data stages methods evaluation compensation serving report recipes verbs errors",
    "verbs/report": "core report errors terminal",
    "verbs/verify": "core errors terminal",
    "terminal": "terminal errors",
    "terminal/results": "core errors terminal",
    "terminal/config": "core errors",
    "terminal/flags": "core.fields recipes.part",
    "terminal/method_flags": "core.fields recipes methods compensation.recipe errors terminal",
    "terminal/shows": (
        "core data stages methods compensation report recipes verbs terminal errors"
    ),
    "cli": "core errors recipes terminal verbs.report verbs.verify",
    "__init__": "_register core errors methods verbs",
    "__main__": "cli",
}
"""File or room -> what of grasp it may import; the longest name that fits counts."""
DOORS = {
    "transformers": {
        "core/cache.py",
        "core/decoder.py",
        "core/models.py",
        "core/checkpoint.py",
        "core/proof.py",
        "core/layers/modeling_grasp.py",
        "core/layers/reading_grasp.py",
        "core/dequantizing.py",
        "compensation/trainer.py",
        "compensation/training.py",
        "serving/onnx.py",
        "serving/openvino.py",
    },
    "torchao": set(),  # what it quantized is read through transformers
    "peft": {"compensation/trainable.py"},
    "accelerate": {
        "compensation/teacher.py",
        "compensation/trainer.py",
        "core/offload.py",
        "evaluation/tasks.py",
    },
    "datasets": {"data/text.py", "evaluation/task_files.py"},
    "rich": {"terminal/bars.py"},
    "matplotlib": {"report/plots.py"},
    "click": {
        "cli.py",
        "terminal/config.py",
        "terminal/ending.py",
        "terminal/flags.py",
        "terminal/method_flags.py",
    },
    "scipy": {"evaluation/fidelity.py"},
    "lm_eval": {"evaluation/tasks.py"},
    "altair": {"report/axes.py", "report/charts.py"},
    "vl_convert": {"report/vega.py"},
    "vllm": {
        "serving/vllm_plugin.py",
        "serving/vllm_linear.py",
        "serving/vllm_embeddings.py",
    },
    "jinja2": {"report/html.py", "evaluation/task_files.py"},
    "openvino": {"serving/openvino.py"},
    "openvino_tokenizers": {"serving/openvino.py"},
}
TYPES_ONLY = {
    ("verbs/compress.py", "transformers"),
    ("verbs/evaluate.py", "transformers"),
    ("verbs/bench.py", "transformers"),
    ("terminal/quieting.py", "transformers"),
    ("verbs/quantize.py", "transformers"),
}


def imports(text: str) -> set[str]:
    """Every module a file imports, in functions too, and by `importlib.import_module("...")`."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            is_package = (
                f"{node.module.replace('.', '/')}/__init__.py".removeprefix("grasp/") in FILES
            )
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if is_package
                else {node.module}
            )
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", "") == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(node.args[0].value)
    return found


def forbidden(files: dict[str, str]) -> list[str]:
    """Imports that break the layering."""
    wrong = []
    for name, text in files.items():
        own = name.removesuffix(".py")
        part = max((room for room in MAY_IMPORT if f"{own}/".startswith(f"{room}/")), key=len)
        for module in imports(text):
            top, _, inner = module.partition(".")
            if top == "grasp":
                allowed = MAY_IMPORT[part].split()
                if (
                    not any(f"{inner}.".startswith(f"{place}.") for place in allowed)
                    and inner != "__version__"
                ):
                    wrong.append(f"{name} imports grasp.{inner}")
            elif top in DOORS and name not in DOORS[top] and (name, top) not in TYPES_ONLY:
                wrong.append(f"{name} imports {top}")
    return wrong


def cycles(files: dict[str, str]) -> list[str]:
    """Files that can reach themselves through imports."""
    names = {
        "grasp." + name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): name
        for name in files
    }
    edges = {
        name: {names[m] for m in imports(text) if m in names} - {name}
        for name, text in files.items()
    }
    edges["__init__.py"] = set()  # loads its names on first use
    found = []
    for start in edges:
        seen, stack = set(), list(edges[start])
        while stack:
            here = stack.pop()
            if here not in seen:
                seen.add(here)
                stack += edges[here]
        if start in seen:
            found.append(start)
    return found


def test_layers_import_downwards_only():
    assert forbidden(FILES) == []
    assert cycles(FILES) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("core/linalg.py", "from grasp.stages.attribution import attribute"),
        ("evaluation/perplexity.py", "def f():\n    from grasp.methods import make"),
        ("methods/shortgpt.py", "import grasp.methods.grasp"),
        ("stages/allocation.py", "import transformers"),
    ],
)
def test_the_check_can_fail(name, line):
    assert forbidden({name: line}) != []


def test_only_edits_change_a_model():
    """`set_submodule` and deleting layers happen in core/edits (and at loading, in the files a
    checkpoint carries, in core/offload.py, and in core/dequantizing.py for what other tools
    quantized); training writes weights too.
    """
    for name, text in FILES.items():
        if not name.startswith(("core/edits/", "core/layers/")) and name not in (
            "core/dequantizing.py",
            "core/offload.py",
            "serving/at_width.py",
            "serving/vllm_linear.py",
        ):
            for call in ("set_submodule", "del stack[", "nn.Parameter(", ".copy_(", "setattr("):
                trains = name.startswith("compensation/") and call == ".copy_("
                assert trains or call not in text, f"{name}: {call}"


def attributes(text: str) -> set[str]:
    """Every name that stands behind a dot."""
    return {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}


def test_methods_and_stages_leave_the_model_to_the_runner():
    """Who holds what in memory is decided in core/runner.py: they see layers, weights and sums."""
    assert "model" in attributes(FILES["core/runner.py"])
    for name, text in FILES.items():
        if name.startswith(("methods/", "stages/")):
            assert "model" not in attributes(text), name


def test_no_method_is_named_outside_its_own_file():
    """The folder is the registry; a default is the one exception, in signatures that have it."""
    for name, text in FILES.items():
        if not name.startswith("methods/") and name not in ("verbs/demo.py",):
            assert "shortgpt" not in text.lower(), name


TOO_LONG = {
    "job.py: begin": 67,
}
"""What 100 columns made too long; each goes when its part is rebuilt."""


def test_files_and_functions_stay_on_a_page():
    """A function's lines are counted without its signature and docstring."""
    for name, text in FILES.items():
        assert text.count("\n") <= TOO_LONG.get(name, 400), name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - first[0].lineno + 1 if first else 0
                here = f"{name.rpartition('/')[2]}: {node.name}"
                assert lines <= TOO_LONG.get(here, 60), f"{here} has {lines} lines"


def test_nothing_is_pickled():
    for name, text in FILES.items():
        assert not imports(text) & {"pickle", "joblib", "shelve", "marshal", "dill"}, name
        assert "torch.save" not in text and "torch.load(" not in text, name


def test_every_module_says_what_it_is_for():
    for name, text in FILES.items():
        assert ast.get_docstring(ast.parse(text)), name


def tree(text: str) -> set[str]:
    """Files and folders that the tree in CONTRIBUTING.md names, by path."""
    block = text[text.index("src/grasp/\n") :].split("```", maxsplit=1)[0].splitlines()[1:]
    found, room = set(), ""
    for line in block:
        depth = len(line) - len(line.lstrip())
        room = room if depth > 2 else ""
        name = line.split()[0]
        if name.endswith("/") and depth == 2:
            room = name
            found.add(name.rstrip("/"))
            continue
        found |= {(room + word).rstrip("/:") for word in line.split() if word == name}
        found |= {
            room + word.rstrip(":") for word in line.split() if word.rstrip(":").endswith(".py")
        }
    return found


def test_the_tree_in_contributing_is_the_folder():
    """Every name in it is there; every room, and every file beside the rooms, is named."""
    named = tree((SOURCE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert {name for name in named if not (SOURCE / name).exists()} == set()
    rooms = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    inner = {path.parent.relative_to(SOURCE).as_posix() for path in SOURCE.glob("*/*/__init__.py")}
    assert rooms | inner | {path.name for path in SOURCE.glob("*.py")} <= named


def test_nobody_else_asks_what_kind_an_edit_is():
    """No `isinstance` on an edit and no reader of its JSON outside core/edits."""
    kinds = {"Drop", "Factorize", "Narrow", "Quantize", "Replace", "ReplaceMLP", "Rewrite"}
    for name, text in FILES.items():
        if name.startswith("core/edits/"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                assert not kinds & set(re.findall(r"\w+", ast.unparse(node.args[1]))), name
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                assert node.slice.value != "edit", f"{name}: {ast.unparse(node)}"
