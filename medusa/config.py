"""Typed configuration: YAML and `a.b=c` overrides become frozen dataclasses; anything unknown is an error.

This file is the mechanism only. Each config class stands beside the code that reads it:

    @strict
    @dataclass(frozen=True, kw_only=True)
    class TrainConfig:
        optim: OptimConfig = field(default_factory=OptimConfig)

    config = load_config(TrainConfig, Path("train.yaml"), ["optim.lr=3e-4"])
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")
_MISSING_KEY = ("missing", "missing_argument", "missing_keyword_only_argument")
_UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")


class ConfigError(ValueError):
    """The configuration cannot be used as given; the message says where, what came and what is allowed."""


def strict(cls: type[T]) -> type[T]:
    """Class decorator above `@dataclass(frozen=True, kw_only=True)`: unknown keys are refused when loaded."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return cls


def load_config(cls: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """The file at `path` (None: all defaults), changed by `overrides` in order, checked against `cls`."""
    data = _read_yaml(path) if path is not None else {}
    for override in overrides:
        _apply_override(cls, data, override)
    return validate(cls, data, source=str(path) if path is not None else "overrides")


def validate(cls: type[T], data: Mapping[str, Any], *, source: str) -> T:
    """`data` checked against `cls`; ConfigError names `source`, the dotted path, what came and what may."""
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        lines = [_explain(cls, data, details) for details in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from error


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON and YAML values; `load_config` reads it back to an equal config."""
    plain = _plain(config)
    if not isinstance(plain, dict):
        raise TypeError(f"a config is a dataclass or a mapping, got {type(config).__name__}")
    return plain


def canonical_json(config: Any) -> str:
    """One text for equal configs, whatever the order of keys or the process: made to be hashed."""
    return json.dumps(_plain(config), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=canonical_json)
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Path):
        return value.as_posix()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} has no place in a config: use plain values or dataclasses")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core scalars: `3e-4` is a number, `off` and `2026-01-01` are text; no key stands twice."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (as the base class has it)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                message = "a key must be a single name, not a list or a mapping"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            if key_node.value in seen:
                message = f"the key {key_node.value!r} stands twice in one mapping"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    return int(text, 0) if text.lower().lstrip("+-").startswith(("0x", "0o")) else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.?[0-9]*)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (looked in {Path.cwd()})") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a YAML file: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_yaml_problem(error)}") from error
    if data is None:
        return {}
    return _mapping(data, f"{path}: the top level")


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{where}not valid YAML: {getattr(error, 'problem', None) or error}"


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a mapping (`key: value` lines), {_came(value)}")
    return value


def _apply_override(cls: type, data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: expected KEY=VALUE such as train.optim.lr=3e-4")
    for depth in range(len(keys)):
        _check_key(cls, keys[: depth + 1], f"override {override!r}: ")
    for depth, key in enumerate(keys[:-1]):
        below = data.get(key)
        where = f"override {override!r}: {'.'.join(keys[: depth + 1])}"
        data[key] = data = {} if below is None else _mapping(below, where)
    data[keys[-1]] = _parse_value(text.strip(), override)


def _parse_value(text: str, override: str) -> Any:
    """`[`, `{` and quotes begin YAML; anything else is one scalar: `#`, `@` and `: ` need no quotes."""
    is_flow = text.startswith(("[", "{", '"', "'"))
    loader = _Loader(text if is_flow else "")
    try:
        if is_flow:
            return loader.get_single_data()
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {_yaml_problem(error)}") from error
    finally:
        loader.dispose()


def _check_key(cls: type, keys: Sequence[str], prefix: str = "") -> None:
    """Raises when the last of `keys` names nothing inside `cls`."""
    holders = _holders(cls, keys[:-1])
    names = [name for holder in holders for name in _hints(holder)]
    if holders is _ANY or keys[-1] in names:
        return
    raise ConfigError(f"{prefix}{_unknown_key(cls, keys, names)}")


def _unknown_key(cls: type, keys: Sequence[str], names: Sequence[str]) -> str:
    dotted, parent = ".".join(keys), ".".join(keys[:-1])
    if not names:
        return f"{dotted}: unknown key; {parent} is a single value and has no keys below it"
    if keys[-1].isdigit():
        return f"{dotted}: the items of a list cannot be set one by one; set the whole: {parent}=[...]"
    prefix = f"{parent}." if parent else ""
    close = [f"{prefix}{name}" for name in get_close_matches(keys[-1], names, n=1, cutoff=0.6)]
    elsewhere = (path for path in _paths(cls) if path.rpartition(".")[2] == keys[-1])
    guess = next(iter(close), None) or next(elsewhere, None)
    hint = f"; did you mean {guess}?" if guess else "."
    return f"{dotted}: unknown key{hint} Allowed in {parent or 'the top level'}: {', '.join(names)}"


def _explain(cls: type, data: Any, details: Any) -> str:
    kind, keys = details["type"], _path_in(data, details)
    dotted = ".".join(map(str, keys)) or "the top level"
    if kind in _UNKNOWN_KEY:
        names = [name for holder in _holders(cls, keys[:-1]) for name in _hints(holder)]
        return _unknown_key(cls, [str(key) for key in keys], names)
    if kind in _MISSING_KEY:
        return f"{dotted}: required but absent; set it in the file or with {dotted}=VALUE"
    if kind in ("dataclass_type", "dict_type"):
        return f"{dotted} must be a mapping (`key: value` lines), {_came(details['input'])}"
    if kind == "value_error":
        return f"{dotted}: {details['msg'].removeprefix('Value error, ')}"
    remedy = "; write it in quotes" if kind == "string_type" and details["input"] is not None else ""
    return f"{dotted}: {details['msg']}, {_came(details['input'])}{remedy}"


def _came(value: Any) -> str:
    text = repr(value)
    return f"got {text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def _path_in(data: Any, details: Any) -> list[Any]:
    """The keys of the input that an error is about; pydantic mixes names of union branches among them."""
    keys, loc = [], details["loc"]
    for position, key in enumerate(loc):
        last_is_absent = position == len(loc) - 1 and details["type"] in _MISSING_KEY
        if isinstance(data, dict) and (key in data or last_is_absent):
            keys.append(key)
            data = data.get(key)
        elif isinstance(data, (list, tuple)) and isinstance(key, int) and key < len(data):
            keys.append(key)
            data = data[key]
    return keys


_ANY: list[type] = []  # the answer of `_holders` below a field that is a free mapping: every key is allowed


def _holders(cls: type, keys: Sequence[Any]) -> list[type]:
    """The config classes that may stand at a dotted path (several for a union)."""
    holders = [cls]
    for key in keys:
        hints = [_hints(holder)[str(key)] for holder in holders if str(key) in _hints(holder)]
        if any(_is_mapping(hint) for hint in hints):
            return _ANY
        if hints:
            holders = [found for hint in hints for found in _dataclasses_in(hint)]
        elif not isinstance(key, int):  # an index of a list keeps the holders of its items
            return []
    return holders


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _is_mapping(hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if isinstance(origin, type):
        return issubclass(origin, Mapping)
    return any(_is_mapping(argument) for argument in typing.get_args(hint))


def _dataclasses_in(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for argument in typing.get_args(hint):
        yield from _dataclasses_in(argument)


def _paths(cls: type, prefix: str = "") -> Iterator[str]:
    for name, hint in _hints(cls).items():
        yield prefix + name
        for below in _dataclasses_in(hint):
            yield from _paths(below, f"{prefix}{name}.")
