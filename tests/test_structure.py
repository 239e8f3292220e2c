"""The rules of the layout (CONTRIBUTING.md): who may import whom, who may change a model, what a file may hold."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "grasp"
FILES = {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}

MAY_IMPORT = {
    "errors": set(),
    "_register": {"core.modeling_grasp"},
    "core": {"core", "errors"},
    "stages": {"core", "errors", "stages.statistics", "stages.text", "stages.files", "stages.curvature"},
    "methods": {"core", "errors", "stages", "methods.base"},
    "evaluation": {"core", "errors", "evaluation"},
    "report": {"core", "errors", "report"},
    "compensation": {"core", "errors", "compensation", "stages.text"},
    "serving": {"core", "errors", "serving"},
    "pipeline": {"core", "errors", "stages", "methods", "report.card"},
    "measurement": {"core", "errors", "stages", "evaluation"},
    "quantization": {"core", "errors", "report.card"},
    "recovery": {"core", "errors", "stages", "compensation", "report.card"},
    "tables": {"core", "errors", "terminal"},
    "reporting": {"errors", "report", "terminal"},
    "verification": {"core.manifest", "core.seal", "errors", "terminal"},
    "experiment": {"core.documents", "core.fields", "errors", "methods"},
    "compare": {"core", "errors", "evaluation", "experiment", "measurement", "pipeline"},
    "flags": {"core.documents", "errors", "methods", "compensation.recipe"},
    "inspection": {"core", "stages", "pipeline"},
    "estimate": {"core", "methods", "stages"},
    "terminal": set(),
    "commands": {
        "compensation.training",
        "core",
        "errors",
        "methods",
        "stages",
        "pipeline",
        "inspection",
        "estimate",
        "experiment",
        "compare",
        "measurement",
        "quantization",
        "recovery",
        "report",
        "serving",
        "tables",
        "terminal",
    },
    "demo": {"core", "errors", "evaluation", "measurement", "report", "pipeline", "tables", "terminal"},
    "cli": {
        "core.children",
        "core.destination",
        "errors",
        "flags",
        "commands",
        "demo",
        "interruption",
        "reporting",
        "terminal",
        "verification",
        "",
    },
    "interruption": set(),
    "__init__": {
        "_register",
        "core",
        "errors",
        "inspection",
        "measurement",
        "methods",
        "pipeline",
        "quantization",
        "recovery",
        "serving",
        "verification",
    },
    "__main__": {"cli"},
}
DOORS = {"transformers": {"core/cache.py", "core/decoder.py", "core/models.py", "core/checkpoint.py", "core/proof.py", "core/modeling_grasp.py", "core/reading_grasp.py", "core/dequantizing.py", "compensation/trainer.py", "compensation/training.py", "serving/onnx.py", "serving/openvino.py"}, "torchao": {"core/rounding.py"}, "peft": {"compensation/trainable.py"}, "accelerate": {"compensation/teacher.py", "compensation/trainer.py"}, "datasets": {"stages/text.py", "evaluation/task_files.py"}, "rich": {"terminal.py"}, "matplotlib": {"report/plots.py"}, "click": {"cli.py", "flags.py"}, "scipy": {"evaluation/fidelity.py"}, "lm_eval": {"evaluation/tasks.py"}, "altair": {"report/charts.py"}, "vl_convert": {"report/vega.py"}, "vllm": {"serving/vllm_plugin.py", "serving/vllm_linear.py"}, "jinja2": {"report/html.py", "evaluation/task_files.py"}, "openvino": {"serving/openvino.py"}, "openvino_tokenizers": {"serving/openvino.py"}}  # fmt: skip
TYPES_ONLY = {
    ("pipeline.py", "transformers"),
    ("inspection.py", "transformers"),
    ("measurement.py", "transformers"),
    ("commands.py", "transformers"),
    ("quantization.py", "transformers"),
}


def imports(text: str) -> set[str]:
    """Every module a file imports, inside functions too, and by `importlib.import_module("...")`."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if node.module != "grasp" else {f"grasp.{alias.name}" for alias in node.names}
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
        part = name.split("/")[0].removesuffix(".py")
        for module in imports(text):
            top, _, inner = module.partition(".")
            if top == "grasp":
                allowed = MAY_IMPORT[part]
                if not any(inner == place or inner.startswith(place + ".") for place in allowed) and inner != "__version__":
                    wrong.append(f"{name} imports grasp.{inner}")
            elif top in DOORS and name not in DOORS[top] and (name, top) not in TYPES_ONLY:
                wrong.append(f"{name} imports {top}")
    return wrong


def cycles(files: dict[str, str]) -> list[str]:
    """Files that can reach themselves through imports."""
    names = {"grasp." + name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): name for name in files}
    edges = {name: {names[m] for m in imports(text) if m in names} - {name} for name, text in files.items()}
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
    """`set_submodule` and deleting layers happen in core/edits.py (and at loading, in the files a checkpoint carries, and in core/dequantizing.py
    for what other tools quantized); training writes weights too."""
    for name, text in FILES.items():
        if name not in (
            "core/edits.py",
            "core/modeling_grasp.py",
            "core/quantized_grasp.py",
            "core/dequantizing.py",
            "serving/vllm_linear.py",
        ):
            for call in ("set_submodule", "del stack[", "nn.Parameter(", ".copy_(", "setattr("):
                trains = name.startswith("compensation/") and call == ".copy_("
                assert trains or call not in text, f"{name}: {call}"


def test_no_method_is_named_outside_its_own_file():
    """The folder is the registry; a default is the one exception, in the signatures that have it."""
    for name, text in FILES.items():
        if not name.startswith("methods/") and name not in ("demo.py",):
            assert "shortgpt" not in text.lower(), name


def test_files_and_functions_stay_on_a_page():
    for name, text in FILES.items():
        assert text.count("\n") <= 400, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.end_lineno - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
                assert body <= 60, f"{name}: {node.name} has {body} lines"


def test_nothing_is_pickled():
    for name, text in FILES.items():
        assert not imports(text) & {"pickle", "joblib", "shelve", "marshal", "dill"}, name
        assert "torch.save" not in text and "torch.load(" not in text, name


def test_every_module_says_what_it_is_for():
    for name, text in FILES.items():
        assert ast.get_docstring(ast.parse(text)), name
