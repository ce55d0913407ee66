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
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "models/chat-8m/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(params=DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
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


def test_every_option_of_a_command_is_one(document):
    """In lines that begin with a command, up to a comment, and those that a backslash continues."""
    text = document.read_text().replace("\\\n", " ")
    unknown = []
    for line in re.findall(r"^(?:\$ )?(medusa [a-z].*)$", re.sub(r"^ +", "", text, flags=re.MULTILINE), re.MULTILINE):
        words = line.split("#")[0].split()[1:]
        command = COMMANDS.get(words[0])
        if command is not None and words[1:]:
            command = getattr(command, "commands", {}).get(words[1], command)
        known = {
            option
            for parameter in getattr(command, "params", ())
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        unknown += [f"{line}: {word}" for word in words if word.startswith("--") and word.split("=")[0] not in known]
    assert unknown == []


def test_every_section_that_a_link_names_is_there(document):
    for target, section in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", document.read_text()):
        headings = re.findall(
            r"^#+ (.+)$", (document.parent / target if target else document).read_text(), re.MULTILINE
        )
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert section in anchors, f"{target}#{section}"


def test_each_command_helps_with_an_example():
    assert "medusa demo" in (app.info.help or "")
    for name, command in COMMANDS.items():
        for path, leaf in {name: command, **{f"{name} {sub}": leaf for sub, leaf in _below(command).items()}}.items():
            assert f"medusa {path}" in (leaf.help or ""), f"`medusa {path} --help` has no example"
            undescribed = [p.name for p in leaf.params if not getattr(p, "help", None) and p.name != "help"]
            assert undescribed == [], f"`medusa {path} --help` does not say what these are"


def _below(command):
    return getattr(command, "commands", {})
