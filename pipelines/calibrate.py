"""The calibrate step: how often each head is right, which trees that makes, and which of them pays on this machine.

<step dir>/checkpoint/        the trained heads with their calibration and ladder of trees in medusa.json
<step dir>/calibration.json   accuracy by head and rank, a row for each tree of the ladder, the step times, the choice

Heads are measured on the rows of the distilled table that training kept back, teacher-forced; tokens a step come from
walking those replies with each tree (medusa/calibration.py), and the product of accuracies is reported beside them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from medusa import Engine, StepTimes, TokenTree
from medusa.calibration import Row, grow_on, guess_replies, head_accuracy, tokens_per_step
from medusa.checkpoint import Calibration, Checkpoint, load_checkpoint, update_meta
from medusa.config import strict, to_dict
from medusa.engine.policy import best_tree
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer
from medusa.tree import expected_tokens
from pipelines.artifact import StepOutput, open_step
from pipelines.split import is_held_back

if TYPE_CHECKING:
    from pipelines.run import RunContext

STEP_VERSION = 2
CHECKPOINT = "checkpoint"
CALIBRATION = "calibration.json"


class CalibrateError(RuntimeError):
    """There is nothing to calibrate on; the message says why and what to do."""


@strict
@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """`sizes` are the trees of the ladder, in nodes; `width` the guesses of each head that trees may use.

    Step times are measured at `batch_sizes`; the tree is chosen at `concurrency`, one of them, and must promise
    `min_gain` more tokens a second than plain decoding there, else speculation is off.
    """

    sizes: list[int]
    width: int = 10
    max_rows: int = 1000
    batch_sizes: list[int]
    concurrency: int = 1
    repeats: int = 10
    context: int = 128
    min_gain: float = 0.02

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes lists tree sizes of at least 1 node, got {self.sizes}")
        if self.concurrency not in self.batch_sizes:
            raise ValueError(f"concurrency {self.concurrency} must be one of batch_sizes {self.batch_sizes}")
        if self.width < 1 or self.max_rows < 1 or self.repeats < 1:
            raise ValueError("width, max_rows and repeats must be at least 1")


def calibrate(
    context: RunContext, config: CalibrateConfig, trained: StepOutput, distilled: StepOutput, held_back: float
) -> StepOutput:
    """Runs the step. `held_back` is the fraction of the table that training left out."""
    inputs = {"train": trained.digest, "distill": distilled.digest}
    with (
        open_step(context.root, "calibrate", STEP_VERSION, config, inputs) as step,
        context.tracker.step(step) as log,
    ):
        if step.complete:
            return step.output
        backbone = context.backbone
        checkpoint = load_checkpoint(trained.path / CHECKPOINT, backbone)
        rows = _held_back_rows(distilled, held_back, config.max_rows)
        guessed = guess_replies(backbone, checkpoint.heads, rows, config.width)
        replies = list(context.track(guessed, "calibrate heads", total=len(rows)))
        accuracy, positions = head_accuracy(replies, checkpoint.config.num_heads, config.width)
        if positions == 0:
            raise CalibrateError(
                f"none of the {len(rows)} rows kept back has a reply longer than the {checkpoint.config.num_heads} "
                "heads reach; distil more or longer replies"
            )
        growth, whole_paths = grow_on(replies, accuracy, max(config.sizes))
        trees = _ladder(growth, config.sizes)
        measured = [tokens_per_step(replies, tree) for tree in trees]
        destination = _calibrated_copy(trained.path / CHECKPOINT, step.path / CHECKPOINT)
        update_meta(
            destination,
            calibration=Calibration(
                accuracy=accuracy,
                num_positions=positions,
                tokens_per_step=measured,
                growth=[list(path) for path in growth],
                path_accuracy=whole_paths,
            ),
            trees=[tree.to_list() for tree in trees],
        )
        times = _measure(context, backbone, load_checkpoint(destination, backbone), config, trees)
        result = _result(config, accuracy, positions, trees, measured, times)
        (step.path / CALIBRATION).write_text(json.dumps(result, indent=2) + "\n")
        log.log_metrics(_metrics(result))
        return step.commit({"counts": {"rows": len(rows), "positions": positions}})


def _ladder(growth: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[TokenTree]:
    """The trees of these sizes, ascending, from the single root on; equal ones (growth ran out) appear once."""
    trees = {TokenTree.from_paths(growth[: size - 1]) for size in (1, *sizes)}
    return sorted(trees, key=lambda tree: tree.num_nodes)


def choose_tree(
    trees: Sequence[TokenTree], measured: Sequence[float], times: StepTimes, batch_size: int, min_gain: float
) -> TokenTree:
    """The tree with the most expected tokens a second at this batch size; one node unless it gains `min_gain`."""
    best = best_tree(trees, measured, times, batch_size)
    gain = dict(zip(trees, measured, strict=True))[best] * times.lookup(batch_size, 1)
    gain /= times.lookup(batch_size, best.num_nodes)
    return best if gain >= 1 + min_gain else TokenTree.root()


def _held_back_rows(distilled: StepOutput, held_back: float, max_rows: int) -> list[Row]:
    columns = ["id", "turn", "prompt_ids", "completion_ids"]
    table = pq.read_table(distilled.path / "data", columns=columns).sort_by(
        [("id", "ascending"), ("turn", "ascending")]
    )
    kept = [row for row in table.to_pylist() if is_held_back(row["id"], held_back)]
    rows = [(row["prompt_ids"], row["completion_ids"]) for row in kept[:max_rows]]
    if not rows:
        raise CalibrateError(
            f"no row of {distilled.path} was kept back from training; raise train.validation_fraction ({held_back}) "
            "or distil more prompts"
        )
    return rows


def _calibrated_copy(source: Path, destination: Path) -> Path:
    if destination.exists():  # an interrupted run's, not yet committed
        shutil.rmtree(destination)
    shutil.copytree(source, destination)
    return destination


def _measure(
    context: RunContext, backbone: Backbone, checkpoint: Checkpoint, config: CalibrateConfig, trees: list[TokenTree]
) -> StepTimes:
    tokenizer = ChatTokenizer.from_pretrained(context.model.backbone)
    engine = Engine(
        backbone,
        tokenizer,
        checkpoint,
        max_batch_size=max(config.batch_sizes),
        max_model_len=min(backbone.max_positions, 2 * config.context),
        speculation="off",
    )
    return engine.measure_step_times(config.batch_sizes, trees, repeats=config.repeats, context=config.context)


def _result(
    config: CalibrateConfig,
    accuracy: list[list[float]],
    positions: int,
    trees: list[TokenTree],
    measured: list[float],
    times: StepTimes,
) -> dict[str, Any]:
    plain = times.lookup(config.concurrency, 1)
    rows = []
    for tree, tokens in zip(trees, measured, strict=True):
        seconds, estimate = times.lookup(config.concurrency, tree.num_nodes), expected_tokens(tree, accuracy)
        rows.append(
            {
                "nodes": tree.num_nodes,
                "tokens_per_step": tokens,
                "product_estimate": estimate,
                "product_error": estimate / tokens - 1,
                "step_seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "speedup": tokens * plain / seconds,
            }
        )
    chosen = {
        str(b): choose_tree(trees, measured, times, b, config.min_gain).num_nodes for b in sorted(config.batch_sizes)
    }
    return {
        "accuracy": accuracy,
        "num_positions": positions,
        "concurrency": config.concurrency,
        "ladder": rows,
        "chosen": chosen,
        **times.to_dict(),
        "config": to_dict(config),
    }


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    metrics = {f"tokens_per_step_{row['nodes']}_nodes": row["tokens_per_step"] for row in result["ladder"]}
    metrics |= {f"head_{k}_top1": head[0] for k, head in enumerate(result["accuracy"])}
    return metrics | {"tree_size": float(result["chosen"][str(result["concurrency"])])}


def load_calibration(output: StepOutput) -> dict[str, Any]:
    """calibration.json of a finished step."""
    return json.loads((output.path / CALIBRATION).read_text())
