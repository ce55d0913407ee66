"""Launch functions on copies of their tensors, so that tests written for CPU tensors run compiled kernels on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def on_device(launch: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The launch function on copies of its tensors. The caller's then hold what the kernels left in them, and stand in
    what is returned where the launch returned a copy, or a view of one."""

    @functools.wraps(launch)
    def launched(*args: Any, **keywords: Any) -> Any:
        copies = _Copies(device)
        there = functools.partial(_mapped, of=copies.there)
        result = launch(*map(there, args), **{name: there(value) for name, value in keywords.items()})
        copies.bring_back()
        return _mapped(result, of=copies.here)

    return launched


class _Copies:
    """Whole storages are copied, once each: a copy lies in memory as its tensor does (strides, views of one another),
    and a write beside a view shows."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []  # bytes of the caller's storages, and of their copies

    def there(self, tensor: torch.Tensor) -> torch.Tensor:
        for here, copy in self._pairs:
            if _shares(here, tensor):
                return _like(tensor, copy)
        here = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        self._pairs.append((here, here.to(self._device, copy=True)))
        return _like(tensor, self._pairs[-1][1])

    def bring_back(self) -> None:
        for here, copy in self._pairs:
            if not torch.equal(here, copy.to(here.device)):
                here.copy_(copy)

    def here(self, tensor: torch.Tensor) -> torch.Tensor:
        for here, copy in self._pairs:
            if _shares(copy, tensor):
                return _like(tensor, here)
        return tensor


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _like(tensor: torch.Tensor, storage: torch.Tensor) -> torch.Tensor:
    """The tensor's place and shape in another storage."""
    empty = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    return empty.set_(storage.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _mapped(value: Any, of: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same value with other tensors, in tuples and dataclasses too."""
    if isinstance(value, torch.Tensor):
        return of(value)
    if type(value) is tuple:
        return tuple(_mapped(each, of) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{field.name: _mapped(getattr(value, field.name), of) for field in fields(value)})
    return value
