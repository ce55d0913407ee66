"""`medusa plan scale`: simulated growth of distillation, training and serving from one GPU's figures.

Nothing here was measured on several GPUs. What goes in is one GPU's step times and training speed (measured, derived or
estimated, as everywhere in plan), Ray's own processor time a block, a request and a chunk, reply lengths, and constants
of the hardware's data sheets; every input is named with its source.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from medusa.config import ConfigError
from medusa.engine.step_times import StepTimes
from medusa.heads import HeadsConfig
from pipelines.distill_config import DistillConfig
from pipelines.plan.collectives import Network
from pipelines.plan.data_parallel import ScaledStep, ddp_step, fsdp_step, step_work
from pipelines.plan.figures import Basis, Figure, Figures, Method, weakest
from pipelines.plan.parallel_work import Distilled, Engines, Served, distil, serve
from pipelines.plan.shapes import HeadsKind, ModelShape
from pipelines.plan.speed import Machine, decode_step, prefill, train_speed
from pipelines.plan.training import Recipe, as_measured, flops_per_token

REPLIES_A_CLIENT = 8  # of a serving run
MAX_GPUS = 64


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is scaled. `batch` is replies at once an engine, for distillation and serving; `rows` prompts an actor;
    `merge_chunks_s` the service's setting: under load the chunks of a stream are that far apart. `step_tokens` training
    tokens a GPU and step. `heads` is the kind to train: alone Hydra's learn soft targets and Medusa's tokens, in
    Medusa-2 both learn tokens. `inside` and `across` are links of figures.yaml."""

    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    prompt_tokens: int = 300
    reply_tokens: int = 200
    batch: int = 64
    rows: int = 1024
    rows_per_block: int = 64
    merge_chunks_s: float = 0.02
    step_tokens: int = 16384
    heads: HeadsKind = "hydra"
    num_heads: int = 4
    vocabulary: str = "own"
    node_gpus: int = 8
    inside: str = "nvlink-4"
    across: str = "ndr-400"
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int) and name != "seed"}
        wrong = {name: value for name, value in numbers.items() if value < 1}
        if wrong or not self.gpus or not all(1 <= n <= MAX_GPUS for n in self.gpus):
            raise ConfigError(f"numbers are from 1 on and GPUs at most {MAX_GPUS}, got {wrong or self.gpus}")
        if self.heads not in ("hydra", "medusa"):
            raise ConfigError(f"heads to train are hydra or medusa (Medusa-1's), got {self.heads!r}")
        if self.vocabulary not in ("own", "shared"):
            raise ConfigError(f"heads' vocabulary is own or shared, got {self.vocabulary!r}")
        for gpus in self.gpus:
            if gpus > self.node_gpus and gpus % self.node_gpus:
                raise ConfigError(f"{gpus} GPUs do not fill nodes of {self.node_gpus}; give a multiple, or fewer")


@dataclass(frozen=True)
class Service:
    """Behind one proxy, or one a node: where its threads run beside each other (`best`), and all on one core."""

    best: Served
    worst: Served

    def shares(self, gpus: int, alone: float) -> tuple[float, float]:
        """Of linear growth from `alone` tokens a second, the worst first."""
        return self.worst.tokens_per_second / (gpus * alone), self.best.tokens_per_second / (gpus * alone)


@dataclass(frozen=True)
class Scaled:
    """One number of GPUs; shares are of linear growth, from one GPU of the same simulation. Serving's are of what one
    replica gives behind a proxy that takes no time, from the worst to the best."""

    gpus: int
    distil: float
    distilled: Distilled
    training: dict[str, ScaledStep]
    one_proxy: tuple[float, float]
    proxy_a_node: tuple[float, float]
    served_by_one: Service
    served_by_node: Service


@dataclass(frozen=True)
class ScalePlan:
    """`basis` of distillation and serving, and of each way of training; `inputs` are all figures that went in."""

    rows: tuple[Scaled, ...]
    basis: dict[str, Basis]
    inputs: dict[str, Figure]


def plan_scaling(model: str, shape: ModelShape, gpu: str, figures: Figures, question: Question) -> ScalePlan:
    machine = Machine(model, shape, gpu, figures)
    steps = _step_times(machine, question)
    reading = prefill(machine, question.prompt_tokens)
    works = {name: (method, recipe) for name, method, recipe in _recipes(shape, question)}
    reply_share = question.reply_tokens / (question.prompt_tokens + question.reply_tokens)
    speeds = {name: _speed(machine, method, recipe, reply_share) for name, (method, recipe) in works.items()}
    network = _network(figures, question)
    times = StepTimes.of_uniform_trees({(batch, 1): step.value for batch, step in steps.items()})
    engines = Engines(lambda batch: times.lookup(batch, 1), reading.value, question.batch)
    jobs = {
        name: step_work(shape, recipe, question.step_tokens, speeds[name].value, reply_share)
        for name, (_, recipe) in works.items()
    }
    ray = figures.measured.ray[0]
    costs = ray.proxy_seconds(_chunks(engines, question))
    alone = _distil(1, engines, question, figures).tokens_per_second
    replica = _serve(1, engines, question, figures, 1, (0.0, 0.0)).best.tokens_per_second
    rows = []
    for gpus in question.gpus:
        distilled = _distil(gpus, engines, question, figures)
        by_one = _serve(gpus, engines, question, figures, 1, costs)
        nodes = -(-gpus // question.node_gpus)
        by_node = by_one if nodes == 1 else _serve(gpus, engines, question, figures, nodes, costs)
        training = {}
        for name, job in jobs.items():
            training[f"{name} ddp"] = ddp_step(job, gpus, network)
            training[f"{name} fsdp"] = fsdp_step(job, gpus, network)
        rows.append(
            Scaled(
                gpus=gpus,
                distil=distilled.tokens_per_second / (gpus * alone),
                distilled=distilled,
                training=training,
                one_proxy=by_one.shares(gpus, replica),
                proxy_a_node=by_node.shares(gpus, replica),
                served_by_one=by_one,
                served_by_node=by_node,
            )
        )
    inputs = {f"step of {batch} replies, s": step for batch, step in steps.items()}
    inputs |= {"prompt, s": reading}
    inputs |= {f"{name}, tokens/s": speed for name, speed in speeds.items()}
    inputs |= {
        "driver, CPU s a block": Figure(ray.block_s, "measured", ray.source),
        "proxy, CPU s a reply, busiest thread": Figure(costs[0], "derived", ray.source),
        "proxy, CPU s a reply, all threads": Figure(costs[1], "derived", ray.source),
        "reply, mean tokens": Figure(
            question.reply_tokens, "estimate", f"assumed; spread of lengths: {figures.measured.replies[0].source}"
        ),
        f"{question.inside}, GB/s": Figure(network.inside / 1e9, "estimate", _link_source(figures, question.inside)),
        f"{question.across}, GB/s": Figure(network.across / 1e9, "estimate", _link_source(figures, question.across)),
    }
    basis: dict[str, Basis] = {"distil and serve": weakest(*steps.values(), reading)}
    return ScalePlan(tuple(rows), basis | {name: speed.basis for name, speed in speeds.items()}, inputs)


def _distil(gpus: int, engines: Engines, question: Question, figures: Figures) -> Distilled:
    ray = figures.measured.ray[0]
    config = DistillConfig(max_batch_size=question.batch, rows_per_block=question.rows_per_block)
    return distil(
        engines,
        gpus,
        reply_lengths(figures, question, gpus * question.rows),
        question.rows_per_block,
        blocks_in_flight=config.blocks_in_flight,
        dispatch_seconds=ray.block_s * question.rows_per_block / ray.rows_per_block,
    )


def _serve(
    gpus: int, engines: Engines, question: Question, figures: Figures, proxies: int, costs: tuple[float, float]
) -> Service:
    replies = reply_lengths(figures, question, gpus * question.batch * REPLIES_A_CLIENT)
    best, worst = (
        serve(engines, gpus, replies, question.batch, proxies=proxies, proxy_seconds=cost, seed=question.seed)
        for cost in costs
    )
    return Service(best, worst)


def _chunks(engines: Engines, question: Question) -> float:
    """Of a mean reply's stream, in a full batch."""
    step = engines.step_seconds(question.batch)
    return question.reply_tokens * step / max(step, question.merge_chunks_s)


def reply_lengths(figures: Figures, question: Question, count: int) -> list[int]:
    """As spread as the measured replies, with the mean that was asked for."""
    row, draw = figures.measured.replies[0], random.Random(question.seed)
    mean = sum((a + b) / 2 for a, b in zip(row.deciles, row.deciles[1:], strict=False)) / (len(row.deciles) - 1)
    lengths = []
    for _ in range(count):
        place = draw.random() * (len(row.deciles) - 1)
        low, part = row.deciles[int(place)], place % 1
        length = low + part * (row.deciles[int(place) + 1] - low)
        lengths.append(max(1, round(length * question.reply_tokens / mean)))
    return lengths


def _step_times(machine: Machine, question: Question) -> dict[int, Figure]:
    context = question.prompt_tokens + question.reply_tokens // 2
    batches = sorted({*(2**power for power in range(question.batch.bit_length())), question.batch})
    return {batch: decode_step(machine, batch, 1, context, None) for batch in batches}


def _recipes(shape: ModelShape, question: Question) -> Iterator[tuple[str, Method, Recipe]]:
    heads = HeadsConfig(
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        num_heads=question.num_heads,
        vocabulary=question.vocabulary,  # type: ignore[arg-type]
    )
    if question.heads == "hydra":
        yield "hydra", "heads", Recipe(heads=heads, kind="hydra", loss="soft")
    else:
        yield "medusa-1", "heads", Recipe(heads=heads)
    yield "medusa-2", "lora", Recipe(heads=heads, kind=question.heads, method="lora", distils=True, checkpointing=True)


def _speed(machine: Machine, method: Method, recipe: Recipe, reply_share: float) -> Figure:
    flops, measured = (flops_per_token(machine.shape, r, reply_share)[1] for r in (recipe, as_measured(recipe)))
    return train_speed(machine, method, flops, measured)


def _network(figures: Figures, question: Question) -> Network:
    assumed = figures.assumptions
    rates = [_link(figures, name) * 1e9 * assumed.link_share for name in (question.inside, question.across)]
    return Network(question.node_gpus, rates[0], rates[1], assumed.collective_latency_us * 1e-6)


def _link(figures: Figures, name: str) -> float:
    if name not in figures.links:
        raise ConfigError(f"no figures of the link {name!r}; known are {', '.join(figures.links)}")
    return figures.links[name].gb_s


def _link_source(figures: Figures, name: str) -> str:
    return f"{figures.links[name].source}; {figures.assumptions.link_share:.0%} of it assumed"


def limits(row: Scaled) -> Sequence[str]:
    """What keeps this number of GPUs from linear growth, in words."""
    words = [
        f"distil: actors idle {row.distilled.idle_share:.1%}, the head busy {row.distilled.dispatch_share:.1%}",
        f"serve: one proxy busy {_busy(row.served_by_one)}, a proxy a node {_busy(row.served_by_node)}; the fullest "
        f"replica holds {row.served_by_node.best.imbalance:.2f} times the mean",
    ]
    words += [
        f"{name}: {1e3 * step.communication:.1f} ms of communication, {1e3 * step.exposed:.1f} ms of it added to "
        f"{1e3 * step.seconds:.0f} ms"
        for name, step in row.training.items()
    ]
    return words


def _busy(service: Service) -> str:
    return f"{service.best.proxy_share:.0%} to {service.worst.proxy_share:.0%}"
