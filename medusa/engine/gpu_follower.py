"""A follower's part of a GPU's steps: the same passes over its share, by graphs of its own, on what it is handed."""

from __future__ import annotations

import torch

from medusa.engine.graphs import Graphs
from medusa.engine.layers import Layers
from medusa.engine.messages import MakeStep, PassShape, StepMove, StepPass
from medusa.engine.team import Receiver
from medusa.kernels.compact import compact
from medusa.model import Backbone


class FollowerStep:
    """Launches what the first process launches, in its order."""

    def __init__(self, backbone: Backbone, pages: torch.Tensor, setup: MakeStep) -> None:
        assert backbone.rank is not None
        self._pages = pages
        self._layers = Layers(backbone, pages, setup.max_positions)
        self._receiver = Receiver(backbone.rank, setup.sizes)
        self._graphs = Graphs(backbone.device, is_alone=False)

    @torch.inference_mode()
    def run(self, order: StepPass) -> None:
        shape = order.shape
        if order.way == "capture":
            self._graphs.capture(shape, lambda: self._pass(shape))
        elif order.way == "graph":
            self._graphs.run(shape, lambda: self._pass(shape))
        else:
            self._pass(shape)

    @torch.inference_mode()
    def move(self, order: StepMove) -> None:
        rows_B, length_R, tables_RP, emitted = self._receiver.accepted(order.batch)
        compact(self._pages, tables_RP, rows_B, emitted, length_R)

    def _pass(self, shape: PassShape) -> None:
        drafts, visible = self._receiver.inputs(shape)
        self._layers(drafts, visible, shape.max_nodes)
        if shape.moves:
            self.move(StepMove(shape.batch))
