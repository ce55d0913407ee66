from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from medusa.config import ConfigError, canonical_json, load_config, strict, to_dict


@strict
@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    warmup_steps: int = 100


@strict
@dataclass(frozen=True, kw_only=True)
class Data:
    files: tuple[Path, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)


@strict
@dataclass(frozen=True, kw_only=True)
class Train:
    name: str
    optim: Optim = field(default_factory=Optim)
    second: Optim | None = None
    stages: tuple[Optim, ...] = ()
    data: Data = field(default_factory=Data)
    speculation: Literal["auto", "off"] | int = "auto"
    epochs: int = 3
    resume: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")


def load(text: str, tmp_path: Path, *overrides: str) -> Train:
    path = tmp_path / "train.yaml"
    path.write_text(text)
    return load_config(Train, path, overrides)


def problem(text: str, tmp_path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, tmp_path, *overrides)
    return str(caught.value)


# ---- what is read


def test_file_then_overrides_in_order(tmp_path: Path) -> None:
    text = "name: demo\noptim: {lr: 0.1, warmup_steps: 5}\nstages:\n  - lr: 1\n  - {}\n"
    config = load(text, tmp_path, "optim.lr=0.2", "optim.lr=0.3", "second.warmup_steps=7")
    assert config.optim == Optim(lr=0.3, warmup_steps=5)
    assert config.second == Optim(warmup_steps=7)
    assert config.stages == (Optim(lr=1.0), Optim())


def test_without_a_file_the_defaults_hold() -> None:
    assert load_config(Train, None, ["name=x"]) == Train(name="x")


def test_an_empty_file_is_an_empty_mapping(tmp_path: Path) -> None:
    assert load("# nothing here\n", tmp_path, "name=x") == Train(name="x")


@pytest.mark.parametrize("written", ["3e-4", "3.0e-4", "0.0003", "3E-4", "+3e-4", "'3e-4'"])
def test_scientific_notation_is_a_number(tmp_path: Path, written: str) -> None:
    assert load(f"name: x\noptim: {{lr: {written}}}", tmp_path).optim.lr == 3e-4
    assert load("name: x", tmp_path, f"optim.lr={written}").optim.lr == 3e-4


@pytest.mark.parametrize("written", ["off", "'off'"])
def test_off_is_a_word_not_false(tmp_path: Path, written: str) -> None:
    assert load(f"name: x\nspeculation: {written}", tmp_path).speculation == "off"
    assert load("name: x", tmp_path, f"speculation={written}").speculation == "off"


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("1_000", 1000), ("0x10", 16), ("0o10", 8), ("-3", -3), ("12:30", "12:30")],
)
def test_numbers_are_read_as_yaml_1_2_reads_them(tmp_path: Path, text: str, value: Any) -> None:
    @dataclass(frozen=True)
    class Free:
        value: int | str

    path = tmp_path / "free.yaml"
    path.write_text(f"value: {text}")
    assert load_config(Free, path) == Free(value)


@pytest.mark.parametrize(
    "written", ["#1: a b", "@home", "sqlite:///x.db", "models:/m@champion", "2026-01-01", "yes", "a=b", "%x"]
)
def test_an_override_is_one_plain_scalar(written: str) -> None:
    assert load_config(Train, None, [f"name={written}"]).name == written


def test_overrides_may_be_lists_mappings_and_quoted() -> None:
    overrides = ["name='123'", "data.files=[a, b/c]", "data.weights={x: 1e-2}", "data.weights.y=2"]
    config = load_config(Train, None, overrides)
    assert config.name == "123"
    assert config.data == Data(files=(Path("a"), Path("b/c")), weights={"x": 0.01, "y": 2.0})


def test_an_empty_override_is_null() -> None:
    assert load_config(Train, None, ["name=x", "second.lr=1", "second="]).second is None


def test_anchors_and_merges_work(tmp_path: Path) -> None:
    text = "name: x\noptim: &o {lr: 0.5}\nsecond: {<<: *o, warmup_steps: 1}\n"
    assert load(text, tmp_path).second == Optim(lr=0.5, warmup_steps=1)


# ---- what is refused, and how it is said


def test_unknown_key_names_its_path_the_closest_key_and_all_allowed(tmp_path: Path) -> None:
    message = problem("name: x\noptim: {warmup_step: 1}\n", tmp_path)
    assert "train.yaml: optim.warmup_step: unknown key; did you mean optim.warmup_steps?" in message
    assert "Allowed in optim: lr, warmup_steps" in message


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    message = problem("optim: {lr: fast}\nstages: [{}, {l: 1}]\nepochs: many\n", tmp_path)
    assert [line.split(": ")[1] for line in message.splitlines()] == [
        "name",
        "optim.lr",
        "stages.1.l",
        "epochs",
    ]
    assert "name: required but absent; set it in the file or with name=VALUE" in message
    assert "got 'fast' (str)" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optm.lr=1", "optm: unknown key; did you mean optim? Allowed in the top level: name, optim, second"),
        ("optim.lrs=1", "optim.lrs: unknown key; did you mean optim.lr? Allowed in optim: lr, warmup_steps"),
        ("warmup_steps=1", "warmup_steps: unknown key; did you mean optim.warmup_steps?"),
        ("second.lrr=1", "second.lrr: unknown key; did you mean second.lr?"),
        ("optim.lr.x=1", "optim.lr is a single value and has no keys below it"),
        ("stages.0.lr=1", "the items of a list cannot be set one by one; set the whole: stages=[...]"),
        ("optim.lr", "expected KEY=VALUE"),
        ("=1", "expected KEY=VALUE"),
        ("optim..lr=1", "expected KEY=VALUE"),
        ("data.files=[a", "not valid YAML"),
        ("optim=3", "optim must be a mapping (`key: value` lines), got 3 (int)"),
        ("speculation=sometimes", "Input should be 'auto' or 'off', got 'sometimes' (str)"),
        ("name=123", "got 123 (int); write it in quotes"),
        ("epochs=0", "epochs must be at least 1, got 0"),
        ("data.weights.x=heavy", "data.weights.x: Input should be a valid number"),
    ],
)
def test_a_bad_override_says_what_came_and_what_is_allowed(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in problem("name: x\n", tmp_path, override)


def test_an_override_below_a_value_of_the_file(tmp_path: Path) -> None:
    assert "optim must be a mapping" in problem("name: x\noptim: 3\n", tmp_path, "optim.lr=1")


def test_missing_file_unreadable_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file \(looked in "):
        load_config(Train, tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read as a YAML file"):
        load_config(Train, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as a YAML file"):
        load_config(Train, tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\noptim: [\n", "line 3, column 1: not valid YAML"),
        ("name: x\n bad: 1\n", "line 2, column 5: not valid YAML: mapping values are not allowed here"),
        ("name: x\nname: y\n", "line 2, column 1: not valid YAML: the key 'name' stands twice"),
        ("? [a]\n: 1\n", "a key must be a single name"),
        ("- name\n", "the top level must be a mapping (`key: value` lines), got ['name'] (list)"),
        ("just text\n", "the top level must be a mapping (`key: value` lines), got 'just text' (str)"),
        ("name: x\noptim: [1, 2]\n", "optim must be a mapping (`key: value` lines), got [1, 2] (list)"),
        ("name: x\nname: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_a_bad_file_says_where(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problem(text, tmp_path)


# ---- what is written


def test_to_dict_reads_back_to_an_equal_config(tmp_path: Path) -> None:
    config = Train(name="x", second=Optim(lr=2e-5), stages=(Optim(),), data=Data(files=(Path("a/b"),)))
    plain = to_dict(config)
    assert plain["data"] == {"files": ["a/b"], "weights": {}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(plain))
    assert load_config(Train, path) == config


def test_canonical_json_does_not_depend_on_order() -> None:
    assert canonical_json({"b": 1, "a": (Path("x"), None)}) == '{"a":["x",null],"b":1}'
    assert canonical_json({"b": 1, "a": 2}) == canonical_json({"a": 2, "b": 1})
    assert canonical_json(Train(name="é")) == canonical_json(to_dict(Train(name="é")))


def test_canonical_json_of_sets_is_the_same_in_every_process() -> None:
    file = Path(__file__).parents[2] / "medusa" / "config.py"  # by itself: the package would load torch
    code = f"import runpy; names = runpy.run_path({str(file)!r}); "
    code += "print(names['canonical_json']({'s': set('medusa'), 'n': {3, 1}}))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert runs == {'{"n":[1,3],"s":["a","d","e","m","s","u"]}\n'}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_canonical_json_refuses_what_json_cannot_say(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": value})


def test_canonical_json_refuses_objects() -> None:
    with pytest.raises(TypeError, match="object has no place in a config"):
        canonical_json({"x": object()})
