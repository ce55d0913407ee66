"""All that a later process needs to go on with the same numbers: where training stands, weights and moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from medusa.heads import DraftHeads
from medusa.training.batch import RowCounts
from medusa.training.loss import HeadTotals
from medusa.training.optimiser import Optimiser
from medusa.training.schedule import TrainerConfig
from medusa.training.sharding import is_sharded, load_sharded, save_sharded
from medusa.training.state import below, read_state, write_state
from medusa.training.totals import Totals

SHARDS, PROGRESS = "shards", "progress"


class Progress:
    """Where training stands: steps done, tokens seen in them, and the sums since the last record. Steps stand for the
    rows that they drew, so that a state is of use only to training over the same rows in the same order."""

    def __init__(self, counts: RowCounts, config: TrainerConfig, num_heads: int, device: torch.device) -> None:
        self.step = 0
        self.tokens_seen = 0
        self.window = Totals.zeros(num_heads, device)
        self._num_heads, self._device = num_heads, device
        self._order = asdict(counts) | {
            "seed": config.seed,
            "batch_size": config.batch_size,
            "bucket_batches": config.bucket_batches,
        }

    def advance(self, totals: Totals, tokens: int) -> None:
        """By one step over all workers."""
        self.step += 1
        self.tokens_seen += tokens
        self.window += totals

    def take_window(self) -> Totals:
        """The sums since it was last taken."""
        window, self.window = self.window, Totals.zeros(self._num_heads, self._device)
        return window

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "sampler": self._order,
            "window": self.window.heads.values_MK,
            "window_lm": self.window.lm_L,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for a state over other rows, or in another order."""
        if state["sampler"] != self._order:
            raise ValueError(
                f"this state was saved over {state['sampler']}, the trainer has {self._order}; "
                "resume with the same rows, batch size and seed, or start anew"
            )
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]
        self.window = Totals(HeadTotals(state["window"].to(self._device)), state["window_lm"].to(self._device))


def save_training(directory: Path, progress: Progress, heads: DraftHeads, optimiser: Optimiser, *, leads: bool) -> None:
    """A new folder: atomically, as safetensors and JSON; of sharded workers each its part (every worker then calls it,
    with a folder of its own or the same, and the one that `leads` writes the progress)."""
    if is_sharded(optimiser.parameters):
        save_sharded(directory / SHARDS, optimiser)
        if leads:
            write_state(directory / PROGRESS, progress.state_dict())
        return
    state = progress.state_dict() | {name: parameter.detach() for name, parameter in optimiser.parameters.items()}
    state |= {f"heads.{name}": buffer for name, buffer in heads.named_buffers()}
    write_state(directory, state | {f"optimizer.{name}": value for name, value in optimiser.state_dict().items()})


def load_training(directory: Path, progress: Progress, optimiser: Optimiser) -> None:
    """Goes on where `save_training` was called: any number of workers, the same rows and batches."""
    if is_sharded(optimiser.parameters):
        progress.load_state_dict(read_state(directory / PROGRESS))
        load_sharded(directory / SHARDS, optimiser)
        return
    state = read_state(directory)
    progress.load_state_dict(state)
    with torch.no_grad():
        for name, parameter in optimiser.parameters.items():
            parameter.copy_(state[name])
    optimiser.load_state_dict(below(state, "optimizer."))
