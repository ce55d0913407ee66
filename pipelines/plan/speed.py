"""How long things take: a formula from the GPU's data sheet, corrected by measurements where there are any.

    decode step   max(bytes / (bandwidth * share), flops / (rate * share)) + layers * overhead
                  with a tree: the plain step * a measured ratio of such steps, where there is one
    prefill       flops / (rate * share)
    training      flops a token / (rate * share)

Bytes are the weights, the heads and the cache of every sequence; flops are 2 a parameter and row.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.plan.figures import Figure, Figures, Gpu, Method, weakest
from pipelines.plan.shapes import BF16, HeadsCost, ModelShape

TERA = 1e12
SAME_CONTEXT = 1.1  # a measured step speaks as it is for contexts up to so much longer or shorter


@dataclass(frozen=True)
class Machine:
    """A model on a GPU, and the figures to judge it by."""

    model: str
    shape: ModelShape
    gpu_name: str
    figures: Figures

    @property
    def gpu(self) -> Gpu:
        return self.figures.gpu(self.gpu_name)


def decode_step(machine: Machine, batch: int, nodes: int, context: int, heads: HeadsCost | None) -> Figure:
    """Seconds of one step of `batch` sequences with trees of `nodes` over `context` tokens each."""
    step = _corrected_step(machine, batch, nodes, context, heads)
    if step.basis == "measured" or heads is None or nodes == 1:
        return step
    ratio = _over_plain(machine, batch, nodes, context, heads)
    if ratio is None:
        return step
    plain = _corrected_step(machine, batch, 1, context, None)
    return Figure(plain.value * ratio.value, weakest(plain, ratio), f"{ratio.how}; the plain step: {plain.how}")


def _corrected_step(machine: Machine, batch: int, nodes: int, context: int, heads: HeadsCost | None) -> Figure:
    """As measured, else the formula times the ratio by which it misses the nearest measured step."""
    formula = decode_formula(machine, machine.shape, batch, nodes, context, heads)
    for name in machine.figures.similar(machine.model, machine.shape.parameters):
        rows = [row for row in machine.figures.measured.decode if (row.gpu, row.model) == (machine.gpu_name, name)]
        if not rows:
            continue
        alike = [row for row in rows if (row.batch, row.nodes) == (batch, nodes)]
        exact = [row for row in alike if _distance(row.context, context) <= SAME_CONTEXT]
        if name == machine.model and exact:
            return Figure(exact[0].seconds, "measured", exact[0].source)
        near = min(rows, key=lambda row: _distance(row.batch, batch) + _distance(row.nodes, nodes))
        said = decode_formula(machine, machine.figures.models[name], near.batch, near.nodes, near.context, heads)
        shape = f"{near.batch} x {near.nodes}, {near.context} tokens"
        how = f"formula * {near.seconds / said:.2f}, as {name} at {shape} ({near.source})"
        return Figure(formula * near.seconds / said, "derived", how)
    return Figure(formula, "estimate", "bytes and flops of the data sheet at assumed shares")


def _over_plain(machine: Machine, batch: int, nodes: int, context: int, heads: HeadsCost) -> Figure | None:
    """A step with a tree over a plain one: the nearest that was measured with heads of this kind, moved to this shape
    as the formula's own ratio moves. None where no such steps were measured."""
    for name in machine.figures.similar(machine.model, machine.shape.parameters):
        shape = machine.figures.models[name]
        measured = [
            (near_batch, near_nodes, ratio, row)
            for row in machine.figures.measured.tree_steps
            if (row.gpu, row.model, row.kind) == (machine.gpu_name, name, heads.kind)
            for near_batch, by_nodes in row.over_plain.items()
            for near_nodes, ratio in by_nodes.items()
        ]
        if not measured:
            continue
        near_batch, near_nodes, ratio, row = min(
            measured,
            key=lambda one: (
                _distance(one[0], batch) + _distance(one[1], nodes),
                abs(one[3].cost(shape).read - heads.read),
            ),
        )
        said = _formula_over_plain(machine, shape, near_batch, near_nodes, row.context, row.cost(shape))
        moved = ratio * _formula_over_plain(machine, machine.shape, batch, nodes, context, heads) / said
        at = f"{near_batch} x {near_nodes}, {row.vocabulary} vocabulary, layers a head: {row.num_layers}"
        how = f"{moved:.2f} plain steps, by the {ratio:.2f} of {name} with {row.kind} heads at {at} ({row.source})"
        return Figure(moved, "derived", how)
    return None


def _formula_over_plain(
    machine: Machine, shape: ModelShape, batch: int, nodes: int, context: int, heads: HeadsCost
) -> float:
    plain = decode_formula(machine, shape, batch, 1, context, None)
    return decode_formula(machine, shape, batch, nodes, context, heads) / plain


def decode_formula(
    machine: Machine, shape: ModelShape, batch: int, nodes: int, context: int, heads: HeadsCost | None
) -> float:
    assumed, gpu, rows = machine.figures.assumptions, machine.gpu, batch * nodes
    weights = shape.parameters - (0 if shape.tied else shape.vocabulary_parameters)  # embeddings: a row a token
    guessing = heads if heads is not None and nodes > 1 else HeadsCost(0, 0, 0)
    read = BF16 * (weights + guessing.read) + batch * context * shape.kv_bytes_per_token
    flops = 2 * rows * weights + 2 * batch * guessing.multiplied
    reading = read / (gpu.bandwidth_tb_s * TERA * assumed.decode_bandwidth_share)
    computing = flops / (gpu.bf16_tflops * TERA * assumed.decode_compute_share)
    return max(reading, computing) + shape.num_layers * assumed.step_overhead_us_per_layer * 1e-6


def prefill(machine: Machine, tokens: int) -> Figure:
    """Seconds of reading a prompt."""
    rate = machine.gpu.bf16_tflops * TERA * machine.figures.assumptions.prefill_compute_share
    return Figure(2 * machine.shape.layer_parameters * tokens / rate, "estimate", "flops at an assumed share")


def train_speed(machine: Machine, method: Method, flops_per_token: float, measured_flops: float) -> Figure:
    """Tokens a second of one GPU. `measured_flops` are those of the recipe as it was measured: where this one takes
    more, a measurement is scaled."""
    rate = machine.gpu.bf16_tflops * TERA
    for name in machine.figures.similar(machine.model, machine.shape.parameters):
        for row in machine.figures.measured.train:
            if (row.gpu, row.model, row.method) != (machine.gpu_name, name, method):
                continue
            if name == machine.model and flops_per_token == measured_flops:
                return Figure(row.tokens_per_second, "measured", row.source)
            ratio = machine.figures.models[name].parameters / machine.shape.parameters
            speed = row.tokens_per_second * ratio * measured_flops / flops_per_token
            scaled = "parameters" if flops_per_token == measured_flops else "parameters and what the heads learn"
            return Figure(speed, "derived", f"as {name} ({row.source}), by {scaled}")
    share = machine.figures.assumptions.train_compute_share[method]
    return Figure(rate * share / flops_per_token, "estimate", f"flops a token at {share:.0%} of the data sheet's rate")


def _distance(a: int, b: int) -> float:
    return max(a / b, b / a)
