"""figures.yaml, checked; and results that say what they rest on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medusa.config import ConfigError, load_config, strict
from medusa.heads import HeadsConfig
from pipelines.plan.shapes import HeadsCost, HeadsKind, ModelShape

FIGURES = Path(__file__).with_name("figures.yaml")
SIMILAR = 4.0  # a measurement speaks for models up to so much larger or smaller
Method = Literal["heads", "lora", "full"]
Basis = Literal["measured", "derived", "published", "estimate"]
BASIS_WORDS: dict[Basis, str] = {
    "measured": "measured",
    "derived": "derived from a measurement of a similar model",
    "published": "rests on figures published by others",
    "estimate": "estimate by formula, not measured",
}


@strict
@dataclass(frozen=True, kw_only=True)
class Gpu:
    memory_gb: float
    bandwidth_tb_s: float
    bf16_tflops: float
    source: str


@strict
@dataclass(frozen=True, kw_only=True)
class Link:
    """Of one GPU, in one direction."""

    gb_s: float
    source: str


@strict
@dataclass(frozen=True, kw_only=True)
class DecodeRow:
    gpu: str
    model: str
    batch: int
    nodes: int
    context: int = 512
    seconds: float
    source: str


@strict
@dataclass(frozen=True, kw_only=True)
class TreeStepsRow:
    """Steps with heads, as multiples of a plain step: `over_plain[batch][nodes]`."""

    gpu: str
    model: str
    kind: HeadsKind
    num_heads: int = 4
    num_layers: int = 1
    vocabulary: Literal["own", "shared"]
    context: int
    over_plain: dict[int, dict[int, float]]
    source: str

    def cost(self, shape: ModelShape) -> HeadsCost:
        heads = HeadsConfig(
            hidden_size=shape.hidden_size,
            vocab_size=shape.vocab_size,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            vocabulary=self.vocabulary,
        )
        return HeadsCost.of(heads, self.kind)


@strict
@dataclass(frozen=True, kw_only=True)
class TrainRow:
    gpu: str
    model: str
    method: Method
    tokens_per_second: float
    source: str


@strict
@dataclass(frozen=True, kw_only=True)
class LadderRow:
    model: str
    kind: HeadsKind
    temperature: float
    nodes: dict[int, float]
    source: str


@strict
@dataclass(frozen=True, kw_only=True)
class RayRow:
    """Processor seconds of Ray's single processes: the driver's a block of distillation (of `rows_per_block` prompts);
    the proxy's a request with one chunk, and a further chunk, of its busiest thread and of all its threads."""

    cpu: str
    block_s: float
    rows_per_block: int
    request_s: float
    chunk_s: float
    request_all_s: float
    chunk_all_s: float
    source: str

    def proxy_seconds(self, chunks: float) -> tuple[float, float]:
        """Of a reply of so many chunks: at least (threads beside each other), at most (all on one core)."""
        at_least = self.request_s + (chunks - 1) * self.chunk_s
        return at_least, self.request_all_s + (chunks - 1) * self.chunk_all_s


@strict
@dataclass(frozen=True, kw_only=True)
class RepliesRow:
    """Reply lengths in tokens: the shortest, each tenth, the longest."""

    model: str
    deciles: list[float]
    source: str

    def __post_init__(self) -> None:
        if len(self.deciles) != 11 or sorted(self.deciles) != self.deciles or self.deciles[0] < 0:
            raise ValueError(f"deciles are 11 rising lengths, the shortest to the longest, got {self.deciles}")


@strict
@dataclass(frozen=True, kw_only=True)
class Measured:
    decode: list[DecodeRow] = field(default_factory=list)
    tree_steps: list[TreeStepsRow] = field(default_factory=list)
    train: list[TrainRow] = field(default_factory=list)
    tokens_per_step: list[LadderRow]
    ray: list[RayRow]
    replies: list[RepliesRow]


@strict
@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    model: str
    medusa: float | None
    joint: float | None
    source: str


@strict
@dataclass(frozen=True, kw_only=True)
class Published:
    tokens_per_step: list[PublishedRow]


@strict
@dataclass(frozen=True, kw_only=True)
class Assumptions:
    decode_bandwidth_share: float
    decode_compute_share: float
    step_overhead_us_per_layer: float
    prefill_compute_share: float
    train_compute_share: dict[Method, float]
    tokens_per_step_64: dict[Literal["medusa", "joint"], float]
    memory_share: float
    runtime_gb: float
    utilisation: float
    link_share: float
    collective_latency_us: float


@strict
@dataclass(frozen=True, kw_only=True)
class Figures:
    gpus: dict[str, Gpu]
    links: dict[str, Link]
    models: dict[str, ModelShape]
    measured: Measured
    published: Published
    assumptions: Assumptions

    def gpu(self, name: str) -> Gpu:
        if name not in self.gpus:
            raise ConfigError(f"no figures of the GPU {name!r}; known are {', '.join(self.gpus)}")
        return self.gpus[name]

    def similar(self, model: str, parameters: int) -> Iterator[str]:
        """Models that a measurement for `model` may stand on: itself first, then those of about its size, nearest
        first."""
        if model in self.models:
            yield model
        sizes = {name: shape.parameters / parameters for name, shape in self.models.items() if name != model}
        near = {name: max(ratio, 1 / ratio) for name, ratio in sizes.items()}
        yield from sorted((name for name, ratio in near.items() if ratio <= SIMILAR), key=near.__getitem__)


@dataclass(frozen=True)
class Figure:
    """A number and what it rests on. `basis` "measured": on this GPU with this model. "derived": a formula scaled by a
    measurement of a similar model on this GPU. "published": by others. "estimate": the formula alone."""

    value: float
    basis: Basis
    how: str


def load_figures(path: Path = FIGURES) -> Figures:
    return load_config(Figures, path)


def weakest(*figures: Figure) -> Basis:
    """What a result rests on that needs all of these."""
    order: tuple[Basis, ...] = ("measured", "derived", "published", "estimate")
    return max((figure.basis for figure in figures), key=order.index)
