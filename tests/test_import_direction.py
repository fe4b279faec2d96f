"""Imports go downwards: errors at the bottom, the command line at the top, and never in a circle."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "tenfold"

# From the bottom up. A name stands for a module or for a package with everything in it; "tenfold" is the
# package's own face (__init__.py). A module may import from lower lines and, without a circle, from its own.
LAYERS = (
    ("errors",),
    ("config", "formats", "checkpoint", "shards"),
    ("machine", "budget", "placement", "planner", "ops", "tokenizer", "chat", "chat_v32", "stops", "_native"),
    ("weights", "streams", "step", "tables", "sampler", "models", "quantise", "peaks", "counting"),
    ("engine", "decoding", "keeping", "store", "synth", "inspection", "calibration", "doctor"),
    ("tenfold",),
    ("completion", "constrain", "contexts", "haystack", "needle", "scheduler", "terminal", "bench"),
    ("needle_grid",),
    ("endpoint", "retrieval"),
    ("protocol", "server", "views", "talk", "store_views", "bench_views", "planner_views", "charts", "report"),
    ("planner_cli", "needle_cli"),
    ("demo",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# ops is called from above with tensors and plain numbers; of the package it needs only these.
OPS_MAY_IMPORT = {"errors", "config", "formats", "_native", "ops"}
WITHOUT_TORCH = (
    "errors",
    "config",
    "formats",
    "checkpoint",
    "shards",
    "machine",
    "placement",
    "planner",
    "planner_views",
    "planner_cli",
    "scheduler",
    "stops",
    "server.app",
    "server.transport",
    "charts",
    "haystack",
    "needle",
    "needle_grid",
    "endpoint",
    "constrain.grammar",
    "constrain.nursery",
    "report",
    "cli",
)
HEAVY = {"torch", "transformers"}  # imported at module level, or inside functions of cli.py alone

MODULES = {
    ".".join(("tenfold", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def owner(module: str) -> str:
    """The line in LAYERS: "tenfold.ops.triton.mhc" -> "ops", "tenfold" -> "tenfold"."""
    return module.split(".")[1] if "." in module else module


def absolute(node: ast.ImportFrom, module: str) -> str:
    """The module a `from` names, with leading dots resolved against `module`."""
    if not node.level:
        return node.module or ""
    parts = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, node.module] if node.module else parts)


def imports(node: ast.AST, module: str) -> Iterator[str]:
    """Every module that the import statements under `node` name, at module level and inside functions."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            source = absolute(child, module)
            for alias in child.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in MODULES else source


def own_imports(module: str) -> set[str]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return {name for name in imports(tree, module) if name.split(".")[0] == "tenfold"} - {module}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_place(module: str) -> None:
    assert owner(module) in LEVEL, f"{module} stands in no line of LAYERS; give it its place there"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    level = LEVEL.get(owner(module), len(LAYERS))
    upwards = {name for name in own_imports(module) if LEVEL.get(owner(name), len(LAYERS)) > level}
    assert not upwards, f"{module} imports upwards: {', '.join(sorted(upwards))}"
    if owner(module) == "ops":
        beyond = {name for name in own_imports(module) if owner(name) not in OPS_MAY_IMPORT}
        assert not beyond, f"{module} imports more than {sorted(OPS_MAY_IMPORT)}: {sorted(beyond)}"


def test_imports_make_no_circle() -> None:
    """Between lines of LAYERS by name, so that `ops` importing its own backends is no circle."""
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        graph.setdefault(owner(module), set()).update(owner(name) for name in own_imports(module))
    for name, needs in graph.items():
        needs.discard(name)
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", [name for name in MODULES if owner(name) != "cli"])
def test_heavy_imports_stand_at_the_top(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    names = {name for function in functions for name in imports(function, module)}
    lazy = {name for name in names if name.split(".")[0] in HEAVY}
    assert not lazy, f"{module} imports {sorted(lazy)} inside a function; only cli.py may"


def test_light_modules_leave_torch_alone() -> None:
    light = [f"tenfold.{name}" for name in WITHOUT_TORCH if f"tenfold.{name}" in MODULES]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'importing {name} imports torch')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *light], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_import_inside_a_function_and_a_relative_one_are_seen() -> None:
    """The eyes of this file: what they miss, no test above can catch."""
    tree = ast.parse("def f():\n    from . import a\n    from ..config import X\n    import tenfold.cli\n")
    assert set(imports(tree, "tenfold.ops")) == {"tenfold.ops", "tenfold.config", "tenfold.cli"}
    tree = ast.parse("if TYPE_CHECKING:\n    from .config import X\n    from tenfold import errors\n")
    assert set(imports(tree, "tenfold.errors")) == {"tenfold.config", "tenfold.errors"}
