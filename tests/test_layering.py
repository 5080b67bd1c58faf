"""Who may import whom (docs/design.md): read from the syntax trees, and shown once by a real import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
BASE = {
    "redone",
    "types",
    "errors",
    "layout",
}  # importable from anywhere; they import nothing of ours but themselves
PURE = BASE | {"api", "config", "algo", "data", "reward", "weights", "rollout", "planner", "record"}
BACKEND = BASE | {"api", "config", "algo", "redone_kernels", "data.pack", "weights"}

# layer -> what it may import of ours; "a.b" allows that one module of a. A layer may always import itself.
ALLOWED: dict[str, set[str]] = {
    "redone": set(),
    "types": set(),
    "errors": set(),
    "layout": {"errors"},
    "redone_kernels": set(),
    "api": BASE,  # and config's types, as everybody: see TYPES_FOR_ALL
    "config": BASE,
    "algo": BASE | {"config", "redone_kernels"},
    "data": BASE | {"config"},
    "reward": BASE | {"api", "config"},
    "weights": BASE | {"api"},
    "record": BASE | {"api", "config", "algo"},
    "planner": BASE | {"config", "record.flops"},
    "rollout": BASE | {"api", "config", "algo", "reward", "data.stream"},
    "trainer": BACKEND,
    "engine": BACKEND,
    "evaluate": PURE,
    "pipeline": PURE | {"evaluate"},
    "bench": PURE | {"pipeline"},
    "scaling": PURE | {"bench"},
    "cluster": PURE | {"trainer", "engine"},
    "redone_launcher": PURE
    | {"evaluate", "pipeline", "cluster", "trainer", "engine", "redone_kernels"}
    | {"bench", "scaling"},
}
TYPES_FOR_ALL = ("redone.config.schema", "redone.api")  # in `if TYPE_CHECKING:` blocks they couple nothing

# vendor -> the only places that may import it (path prefixes)
VENDORS: dict[str, tuple[str, ...]] = {
    "ray": ("redone/cluster/", "launcher/redone_launcher/"),
    "megatron": ("redone/trainer/megatron/",),
    "transformer_engine": ("redone/trainer/megatron/",),
    "apex": ("redone/trainer/megatron/",),
    "vllm": ("redone/engine/vllm.py",),
    "sglang": ("redone/engine/sglang.py",),
    "triton": ("kernels/",),
    "wandb": ("redone/record/sinks.py",),
    "mlflow": ("redone/record/sinks.py",),
}
SOURCES = {"redone": "", "redone_kernels": "kernels/", "redone_launcher": "launcher/"}


def module_files(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted module, file) of everything we ship."""
    for package, place in SOURCES.items():
        base = root / place
        for file in sorted((base / package).rglob("*.py")):
            parts = file.relative_to(base).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def imported(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also those inside functions and import_module("constant")."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
        if isinstance(inner, ast.ImportFrom) and inner.module in TYPES_FOR_ALL
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                prefix = ".".join([*parents, prefix] if prefix else parents)
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def layer_of(dotted: str) -> str:
    """redone.trainer.megatron.x -> trainer; redone_launcher.main -> redone_launcher; redone -> redone."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "redone" and len(parts) > 1 else parts[0]


def may_import(layer: str, name: str) -> bool:
    """Whether code of `layer` may import `name`, a dotted name of ours."""
    target = layer_of(name)
    if name.startswith("redone.") and target.startswith("__"):  # redone.__version__
        target = "redone"
    allowed = ALLOWED.get(layer, set())
    inner = ".".join(name.split(".")[1:])
    return (
        target == layer
        or target in allowed
        or any("." in a and f"{inner}.".startswith(f"{a}.") for a in allowed)
    )


def import_violations(root: Path) -> list[str]:
    """One line per import that crosses a line, or comes from a package that the table does not know."""
    found = []
    for module, file in module_files(root):
        place = file.relative_to(root).as_posix()
        layer = layer_of(module)
        if layer not in ALLOWED:
            found.append(f"{place}: package {layer!r} is not in the table of layers")
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for line, name in imported(tree, module, file.name == "__init__.py"):
            top = name.split(".")[0]
            if top in SOURCES and not may_import(layer, name):
                found.append(f"{place}:{line}: {layer} must not import {name}")
            if top in VENDORS and not place.startswith(VENDORS[top]):
                found.append(f"{place}:{line}: {top} only in {', '.join(VENDORS[top])}")
    return found


def size_violations(root: Path, max_file: int = 400, max_function: int = 70) -> list[str]:
    """Files and functions that outgrew the limits (lines)."""
    found = []
    for folder in ("redone", "kernels", "launcher", "benchmarks", "tests"):
        for file in sorted((root / folder).rglob("*.py")):
            text, place = file.read_text(encoding="utf-8"), file.relative_to(root).as_posix()
            if (lines := text.count("\n")) > max_file:
                found.append(f"{place}: {lines} lines, at most {max_file}")
            if "/jit/" in place:
                continue  # a Triton kernel is one function, a third of it its parameters
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    size = (node.end_lineno or node.lineno) - node.lineno + 1
                    if size > max_function:
                        found.append(
                            f"{place}:{node.lineno}: {node.name} has {size} lines, at most {max_function}"
                        )
    return found


def test_no_import_crosses_a_line() -> None:
    assert len(list(module_files(REPO))) > 20
    assert import_violations(REPO) == []


def test_files_and_functions_are_small() -> None:
    assert size_violations(REPO) == []


@pytest.mark.parametrize(
    ("place", "line", "expected"),
    [
        ("redone/pipeline/step.py", "import ray", "ray only in"),
        (
            "redone/pipeline/step.py",
            "def f():\n    from redone.trainer.megatron import step",
            "pipeline must not",
        ),
        ("redone/pipeline/step.py", "from redone.cluster.actors import Fleet", "pipeline must not"),
        ("redone/algo/loss.py", "from redone.data.pack import plan", "algo must not"),
        ("redone/types.py", "from redone.api import Trainer", "types must not"),
        ("redone/trainer/megatron/step.py", "from redone.data import stream", "trainer must not"),
        ("redone/planner/memory.py", "from redone.record import sinks", "planner must not"),
        ("redone/engine/base.py", "import importlib\nimportlib.import_module('vllm.engine')", "vllm only in"),
        ("redone/engine/base.py", "from ..trainer.megatron import names", "engine must not"),
        (
            "redone/weights/plan.py",
            "if TYPE_CHECKING:\n    from redone.trainer import names",
            "weights must not",
        ),
        ("redone/surprise/x.py", "", "not in the table"),
        ("kernels/redone_kernels/loss.py", "import redone.types", "redone_kernels must not"),
        ("redone/config/check.py", "import triton.language as tl", "triton only in"),
    ],
)
def test_planted_violations_are_found(tmp_path: Path, place: str, line: str, expected: str) -> None:
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    (problem,) = import_violations(tmp_path)
    assert expected in problem and place in problem


@pytest.mark.parametrize(
    ("place", "line"),
    [
        (
            "redone/planner/memory.py",
            "from redone.record.flops import flops_per_token\nfrom redone.record import flops",
        ),
        ("redone/trainer/megatron/step.py", "import megatron.core\nfrom redone.data.pack import build"),
        ("redone/weights/plan.py", "if TYPE_CHECKING:\n    from redone.config.schema import WeightsConfig"),
        ("redone/cluster/actors.py", "import ray\nfrom . import placement\nfrom redone import __version__"),
    ],
)
def test_allowed_imports_pass(tmp_path: Path, place: str, line: str) -> None:
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    assert import_violations(tmp_path) == []


def test_planted_sizes_are_found(tmp_path: Path) -> None:
    (tmp_path / "redone").mkdir()
    (tmp_path / "redone/long.py").write_text("def f():\n" + "    x = 1\n" * 70 + "\n" * 330)
    file_problem, function_problem = size_violations(tmp_path)
    assert "401 lines" in file_problem and "f has 71 lines" in function_problem


REFUSE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "megatron", "vllm", "sglang", "triton"}:
            raise ImportError(f"{name} must not be needed here")
sys.meta_path.insert(0, Refuse())
import redone.pipeline.step
assert not {"ray", "megatron", "vllm", "sglang", "triton"} & set(sys.modules)
"""


def test_the_step_imports_without_any_vendor() -> None:
    """The finder refuses the five packages, as in an environment that has none of them."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSE], capture_output=True, text=True, timeout=120, cwd=REPO
    )
    assert done.returncode == 0, done.stderr[-2000:]
