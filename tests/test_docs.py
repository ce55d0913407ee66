"""What the documents name exists: files, make targets, commands, configuration keys and imports."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
from typer.main import get_command

from cli.main import app
from pipelines.run import load_pipeline

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.name)
def document(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_link_leads_to_a_file(document):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_every_path_of_the_project_exists(document):
    paths = re.findall(
        r"`((?:medusa|pipelines|registry|deployments|benchmarks|cli|models|tests|docs)/[\w./-]*)`", document.read_text()
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_command_is_one(document):
    named = re.findall(r"(?:^|`)medusa ([a-z]+)", document.read_text(), re.MULTILINE)
    assert [name for name in named if name not in COMMANDS] == []


def test_every_make_target_is_one(document):
    named = re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(), re.MULTILINE)
    assert [name for name in named if name not in TARGETS] == []


def test_every_python_example_imports_what_exists():
    for source in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines" / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_loads(path):
    assert load_pipeline(path).name == path.stem


def test_each_command_helps_with_an_example():
    for name, command in COMMANDS.items():
        assert f"medusa {name}" in (command.help or ""), f"`medusa {name} --help` has no example"
