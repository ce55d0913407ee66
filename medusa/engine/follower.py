"""A process of rank 1 or up of a tensor-parallel engine: a share of the decoder and of its cache, and nothing else.

It knows no sequences, no sampling and no heads. The first process decides all of that, tells each pass over nodes, and
meets this one in its sums; so the two cannot come to differ.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from datetime import timedelta
from functools import singledispatchmethod
from multiprocessing.connection import Connection
from typing import Any, Never

import torch
from torch import distributed
from transformers.utils import logging

from medusa.engine.followers import STEP_TIMEOUT_S
from medusa.engine.kv_cache import empty_pages, move
from medusa.engine.messages import (
    Done,
    Failed,
    Load,
    MakePages,
    MakeStep,
    Move,
    PlainPass,
    Proceed,
    StepMove,
    StepPass,
    TreePass,
    on,
)
from medusa.model import Backbone
from medusa.parallel import device_of, join


class Follower:
    """Does what it is told until the first process closes the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._backbone = self._loaded(connection.recv())
        self._pages: torch.Tensor | None = None
        self._step: Any = None  # a FollowerStep, once there is one

    def run(self) -> Never:
        while True:
            self._do(self._connection.recv())

    def _loaded(self, order: Load) -> Backbone:
        torch.set_num_threads(order.num_threads)
        torch.zeros(1, device=device_of(order.device_type, order.index))  # a GPU that cannot be had is said here
        self._connection.send(Done())  # it is here: only now may others wait for it in the group
        store = distributed.TCPStore("127.0.0.1", order.port, order.size, timeout=timedelta(seconds=STEP_TIMEOUT_S))
        rank = join(
            store,
            order.index,
            order.size,
            device_type=order.device_type,
            timeout=timedelta(seconds=order.timeout_s),
            meet=self._meet,
        )
        return Backbone.from_pretrained(order.directory, dtype=order.dtype, rank=rank)

    def _meet(self) -> None:
        self._connection.send(Done())
        assert isinstance(self._connection.recv(), Proceed)

    @singledispatchmethod
    def _do(self, order: object) -> None:
        raise TypeError(f"a follower does not know {type(order).__name__}")

    @_do.register
    def _(self, order: MakePages) -> None:
        backbone = self._backbone
        self._pages = empty_pages(
            backbone.num_layers, order.num_pages, backbone.kv_shape, backbone.dtype, backbone.device
        )
        self._connection.send(Done())

    @_do.register
    def _(self, order: MakeStep) -> None:
        from medusa.engine.gpu_follower import FollowerStep  # Triton is not installed everywhere

        assert self._pages is not None
        self._step = FollowerStep(self._backbone, self._pages, order)
        self._connection.send(Done())

    @_do.register
    def _(self, order: StepPass) -> None:
        self._step.run(order)

    @_do.register
    def _(self, order: StepMove) -> None:
        self._step.move(order)

    @_do.register
    @torch.inference_mode()
    def _(self, order: TreePass) -> None:
        assert self._pages is not None
        device = self._pages.device
        self._backbone.tree_hidden_states(
            on(device, order.token_BN), on(device, order.position_BN), order.tree(self._pages)
        )

    @_do.register
    @torch.inference_mode()
    def _(self, order: PlainPass) -> None:
        self._backbone.hidden_states(on(self._backbone.device, order.token_BT))

    @_do.register
    @torch.inference_mode()
    def _(self, order: Move) -> None:
        assert self._pages is not None
        device = self._pages.device
        move(self._pages, on(device, order.source_2BD), on(device, order.target_2BD))


def main(descriptor: int) -> int:
    connection = Connection(descriptor)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        Follower(connection).run()
    except EOFError:  # the first process has closed the pipe, or is gone
        return 0
    except Exception as error:  # noqa: BLE001 (whatever it was, the first process names it and this one ends)
        traceback.print_exc()
        _tell(connection, Failed(f"{type(error).__name__}: {error}"))
        return 1


def _tell(connection: Connection, message: Failed) -> None:
    with contextlib.suppress(OSError):  # nobody is left to tell
        connection.send(message)


if __name__ == "__main__":
    status = main(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(status)  # what is left of a broken group may not hold the exit up
