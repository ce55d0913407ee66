"""Imports run one way, and importing does nothing but define. ruff's banned-api says it first, per package."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("medusa", "registry", "pipelines", "deployments", "benchmarks", "cli")
MAY_IMPORT = {  # of our own packages
    "medusa": {"medusa"},
    "registry": {"registry", "medusa"},
    "pipelines": {"pipelines", "registry", "medusa"},
    "deployments": {"deployments", "registry", "medusa"},
    "benchmarks": {"benchmarks", "deployments", "pipelines", "registry", "medusa"},
    "cli": set(PACKAGES),
}
CORE_FLOORS = (  # of medusa/, lowest first; a file imports its own floor and the floors below it
    {
        "attention",
        "config",
        "digests",
        "grammar",
        "kernels",
        "loops",
        "noise",
        "sampling",
        "tokenizer",
        "tree",
        "heads",
        "hydra",
    }
    | {"folders", "parallel", "quantization", "quantized_linear", "weights"},
    {"decoding", "checkpoint", "model", "adapter", "drafter"},
    {"calibration", "quality", "growth", "engine", "export", "training"},
)
NOT_IN_CORE = {"ray", "mlflow", "fastapi", "starlette", "uvicorn", "openai", "datasets", "matplotlib"}
NOT_WRITTEN_IN_CORE = NOT_IN_CORE | {"httpx", "typer", "rich", "pyarrow"}  # transformers loads some of these itself


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, for_types: bool = True) -> Iterator[str]:
    """Every dotted name that a file imports, at any depth; `from a import b` counts as `a.b`."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    if not for_types:
        tree = WithoutTypeChecking().visit(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


class WithoutTypeChecking(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return node.orelse
        return self.generic_visit(node)


def module_of(name: str) -> str | None:
    """The module of ours behind an imported name, or None."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:end])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return ".".join(parts[:end])
    return None


def floor(module: str) -> int:
    """The floor of a module of medusa/; `medusa` itself stands above them all."""
    part = (module.split(".") + [""])[1]
    found = [height for height, names in enumerate(CORE_FLOORS) if part in names]
    assert found or not part, f"{module} stands on no floor: add it to CORE_FLOORS"
    return found[0] if found else len(CORE_FLOORS)


def loadable(paths: list[Path]) -> list[str]:
    """The modules of these files, without those that need Triton where it is not installed."""
    without = set() if importlib.util.find_spec("triton") else {"triton"}
    return [dotted(path) for path in paths if not {name.partition(".")[0] for name in imports(path)} & without]


ALL = [path for package in PACKAGES for path in modules(package)]


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_no_package_above_its_own(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    roots = {name.partition(".")[0] for name in imports(path)}
    assert not (roots & set(PACKAGES)) - MAY_IMPORT[package]
    if package == "medusa":
        assert not roots & NOT_WRITTEN_IN_CORE
    if package == "registry":
        assert not [name for name in imports(path) if name.startswith(("medusa.engine", "medusa.training"))]


@pytest.mark.parametrize("path", modules("medusa"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_is_built_in_floors(path: Path) -> None:
    here = dotted(path)
    for name in imports(path):
        there = module_of(name)
        if there is None or not there.startswith("medusa"):
            continue
        assert floor(there) <= floor(here), f"{here} imports {there}, which stands above it"
        if here.startswith("medusa."):
            assert {here.split(".")[1], there.split(".")[1]} != {"engine", "training"}, f"{here} imports {there}"


def test_no_imports_run_in_a_circle() -> None:
    graph = {
        dotted(path): {module_of(name) for name in imports(path, for_types=False)} - {None, dotted(path)}
        for path in ALL
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle: {' -> '.join([*trail[trail.index(module) :], module])}"
        if module not in done:
            for below in sorted(graph.get(module, ())):
                visit(below, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_kernels_stand_where_all_of_them_are_compiled_ahead_of_time() -> None:
    """tests/medusa/kernels/aot.py finds what `@triton.jit` made of a function of a file of one folder, nothing else."""
    folder, found = ROOT / "medusa" / "kernels", 0
    for path in ALL:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for node in ast.walk(tree):
            decorators = [ast.unparse(each) for each in getattr(node, "decorator_list", [])]
            if any("jit" in each or "triton" in each for each in decorators):
                where = f"{path}:{node.lineno}"
                assert len(decorators) == 1 and decorators[0].startswith("triton.jit"), where
                assert path.parent == folder and node in tree.body, where
                found += 1
    assert found > 0


def run_python(code: str, folder: Path, *arguments: str) -> dict[str, list[str]]:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_core_loads_no_runtime(tmp_path: Path) -> None:
    code = (
        "import sys, json, importlib\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(json.dumps({'loaded': sorted({name.partition('.')[0] for name in sys.modules})}))"
    )
    loaded = set(run_python(code, tmp_path, *loadable(modules("medusa")))["loaded"])
    assert "torch" in loaded
    assert not loaded & (NOT_IN_CORE | set(PACKAGES) - {"medusa"})


IMPORT_AND_COMPARE = """
import importlib, json, logging, os, sys, threading
from pathlib import Path

ours, theirs = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for name in theirs:
    parent, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ImportError:  # a name inside a module, or an extra that is not installed here
        getattr(sys.modules.get(parent), attribute, None)

def state():
    return {
        "files": sorted(str(path) for path in Path.home().rglob("*")),
        "environment": sorted(f"{key}={value}" for key, value in os.environ.items()),
        "log handlers": [str(handler) for handler in logging.getLogger().handlers],
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "path": list(sys.path),
    }

before = state()
for name in ours:
    importlib.import_module(name)
after = state()
changes = {key: sorted(set(before[key]) ^ set(after[key])) for key in before}
print(json.dumps({key: change for key, change in changes.items() if change}))
"""


def test_importing_every_module_has_no_effect_but_definitions(tmp_path: Path) -> None:
    ours = loadable([path for path in ALL if path.stem != "__main__"])
    names = {name for path in ALL for name in imports(path) if name.partition(".")[0] not in PACKAGES}
    theirs = sorted(names | {name.rpartition(".")[0] for name in names} - {""})  # a module before its names
    assert run_python(IMPORT_AND_COMPARE, tmp_path, json.dumps(ours), json.dumps(theirs)) == {}
