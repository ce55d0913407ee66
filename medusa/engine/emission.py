"""A step's tokens on their way to the host.

Shapes: B sequences, D deepest depth + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from medusa.engine.step import StepTokens
from medusa.kernels.state import Emitted


@dataclass(frozen=True)
class Emission:
    """What a launch emits for its first `count` sequences (padding follows), copied to the host while it goes on."""

    tokens_BD: torch.Tensor
    num_B: torch.Tensor
    count: int
    event: torch.cuda.Event | None

    @classmethod
    def of(cls, emitted: Emitted, count: int) -> Emission:
        if emitted.tokens_BD.device.type != "cuda":
            return cls(emitted.tokens_BD.clone(), emitted.num_B.clone(), count, None)
        tokens_BD = torch.empty(emitted.tokens_BD.shape, dtype=torch.int64, pin_memory=True)
        num_B = torch.empty(emitted.num_B.shape, dtype=torch.int32, pin_memory=True)
        tokens_BD.copy_(emitted.tokens_BD, non_blocking=True)
        num_B.copy_(emitted.num_B, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return cls(tokens_BD, num_B, count, event)

    def collect(self) -> list[StepTokens]:
        """Waits for the copy alone; later launches go on."""
        if self.event is not None:
            self.event.synchronize()
        emitted = zip(self.tokens_BD[: self.count].tolist(), self.num_B[: self.count].tolist(), strict=True)
        return [StepTokens(tokens[:num], []) for tokens, num in emitted]
