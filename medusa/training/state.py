"""A flat state dict on disk: tensors in safetensors, the rest in JSON, never pickle; whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from medusa.folders import whole_folder

TENSORS = "state.safetensors"
VALUES = "state.json"


def write_state(directory: Path, state: Mapping[str, Any]) -> None:
    """The folder appears by one rename; a folder that exists is an error."""
    tensors = _apart({key: value.cpu().contiguous() for key, value in state.items() if isinstance(value, Tensor)})
    values = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    with whole_folder(directory) as folder:
        save_file(tensors, folder / TENSORS)
        (folder / VALUES).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def read_state(directory: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((Path(directory) / VALUES).read_text())
    return values | load_file(Path(directory) / TENSORS)


def below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What the names that begin so hold, by the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With memory of their own: safetensors writes no tensor that shares another's, as tables of 8-bit moments do."""
    seen: set[int] = set()
    apart = {}
    for key, value in tensors.items():
        apart[key] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return apart
