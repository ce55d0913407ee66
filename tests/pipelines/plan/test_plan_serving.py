"""Planning a service: a simulated replica carries the load that is planned for it and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from medusa.config import ConfigError
from medusa.heads import HeadsConfig
from pipelines.plan.figures import DecodeRow, load_figures
from pipelines.plan.serving import Load, expected_ladder, plan_serving
from pipelines.plan.shapes import HeadsCost
from pipelines.plan.speed import Machine, decode_step, prefill

FIGURES = load_figures()
VICUNA = "lmsys/vicuna-7b-v1.5"
HEADS = HeadsCost.of(HeadsConfig(hidden_size=4096, vocab_size=32000, num_heads=5))
LOAD = Load(requests_per_second=40, prompt_tokens=300, reply_tokens=200)


def plan(load=LOAD, model=VICUNA, heads=HEADS, gpu="h100-80gb", figures=FIGURES, **asked):
    ladder, basis = expected_ladder(model, "medusa", figures)
    return plan_serving(model, figures.models[model], heads, ladder, basis, load, gpu, figures, **asked)


def waiting_after(requests_per_second, found, seconds=60.0):
    """Requests in line at the end: arrivals one by one, a prefill each, and steps of all replies under way."""
    machine = Machine(VICUNA, FIGURES.models[VICUNA], "h100-80gb", FIGURES)
    reading, point = prefill(machine, LOAD.prompt_tokens).value, found.point
    now, arrived, waiting, replies = 0.0, 0, 0, []
    while now < seconds:
        due = int(now * requests_per_second)
        waiting, arrived = waiting + due - arrived, due
        while waiting and len(replies) < point.batch:
            waiting, now = waiting - 1, now + reading
            replies.append(float(LOAD.reply_tokens))
        now += point.step.value  # a step of a full batch, however many there are: the slowest it can be
        replies = [left - point.tokens_per_step for left in replies if left > point.tokens_per_step]
    return waiting


def test_a_replica_carries_its_planned_load_and_no_more():
    found = plan()
    capacity = found.point.requests_per_second
    assert waiting_after(found.utilisation * capacity, found) == 0
    assert waiting_after(1.3 * capacity, found) > 100
    assert found.replicas * found.utilisation * capacity >= LOAD.requests_per_second
    assert (found.replicas - 1) * found.utilisation * capacity < LOAD.requests_per_second


def test_trees_shrink_as_replies_fill_the_replica():
    nodes = [point.nodes for point in plan().points]
    assert nodes[0] == 64 and nodes == sorted(nodes, reverse=True) and nodes[-1] < 16
    speeds = [point.requests_per_second for point in plan().points]
    assert speeds == sorted(speeds)


def test_plain_decoding_takes_more_gpus_or_cannot_keep_the_pace():
    busy = replace(LOAD, requests_per_second=400)
    found = plan(busy)
    assert found.plain_replicas > found.replicas
    hurried = plan(busy, max_ms_per_token=4.0)
    assert hurried.point.ms_per_token <= 4.0 and hurried.replicas > found.replicas
    assert hurried.plain_replicas is None
    with pytest.raises(ConfigError, match="ms a token with one reply at a time, more than the 0.5 allowed"):
        plan(max_ms_per_token=0.5)


def test_memory_bounds_the_replies_at_a_time():
    long = plan(replace(LOAD, prompt_tokens=8000, reply_tokens=500))
    assert long.max_batch < plan().max_batch
    assert sum(long.memory.values()) <= 80e9 * FIGURES.assumptions.memory_share / 2**30 * 1.0001
    assert plan(max_batch_size=16).max_batch == 16
    with pytest.raises(ConfigError, match="does not spread a model over GPUs"):
        plan(model="lmsys/vicuna-33b-v1.3", gpu="l40s-48gb")


def test_estimates_and_measurements_are_told_apart():
    found = plan()
    assert found.basis == "estimate" and found.tokens_per_step.basis == "published"
    rows = [DecodeRow(gpu="h100-80gb", model=VICUNA, batch=1, nodes=1, seconds=0.01, source="docs/x.md")]
    figures = replace(FIGURES, measured=replace(FIGURES.measured, decode=rows))
    machine = Machine(VICUNA, FIGURES.models[VICUNA], "h100-80gb", figures)
    exact = decode_step(machine, 1, 1, 512, None)
    assert (exact.value, exact.basis, exact.how) == (0.01, "measured", "docs/x.md")
    scaled, formula = (
        decode_step(machine, 4, 1, 512, None),
        decode_step(replace(machine, figures=FIGURES), 4, 1, 512, None),
    )
    assert scaled.basis == "derived" and formula.basis == "estimate"
    at_one = decode_step(replace(machine, figures=FIGURES), 1, 1, 512, None)
    assert scaled.value / formula.value == pytest.approx(0.01 / at_one.value)
    other = Machine(
        "HuggingFaceH4/zephyr-7b-beta", FIGURES.models["HuggingFaceH4/zephyr-7b-beta"], "h100-80gb", figures
    )
    assert decode_step(other, 1, 1, 512, None).basis == "derived"
    assert decode_step(replace(other, gpu_name="a100-80gb"), 1, 1, 512, None).basis == "estimate"


def test_ladders_end_at_the_figure_that_is_known():
    published, basis = expected_ladder(VICUNA, "joint", FIGURES)
    assert (published[1], published[64], basis.basis) == (1.0, pytest.approx(3.47), "published")
    assert list(published.values()) == sorted(published.values())
    _, assumed = expected_ladder("Qwen/Qwen3-8B", "medusa", FIGURES)
    assert assumed.basis == "estimate"
    given, basis = expected_ladder("Qwen/Qwen3-8B", "medusa", FIGURES, at_64=2.2)
    assert given[64] == pytest.approx(2.2) and basis.basis == "measured"


def test_hydra_heads_have_the_ladder_that_was_measured():
    for model in (VICUNA, "Qwen/Qwen3-8B"):  # no figure published for Medusa's heads speaks for these
        ladder, basis = expected_ladder(model, "hydra", FIGURES)
        assert list(ladder.values()) == pytest.approx([1.0, 1.509, 1.896, 2.198, 2.418, 2.613, 2.767])
        assert (basis.value, basis.basis) == (2.767, "estimate") and "chat-28m" in basis.how
    given, basis = expected_ladder(VICUNA, "hydra", FIGURES, at_64=1.0 + 1.767 / 2)
    assert given[2] == pytest.approx(1.2545) and basis.basis == "measured"


def heads_cost(kind, **shape):
    return HeadsCost.of(HeadsConfig(hidden_size=4096, vocab_size=32000, num_heads=4, **shape), kind)


@pytest.mark.parametrize(
    ("kind", "shape", "batch", "nodes", "ratio"),
    [
        ("hydra", {"vocabulary": "shared"}, 16, 8, 1.216),
        ("hydra", {"vocabulary": "shared"}, 1, 64, 1.217),
        ("hydra", {"num_layers": 4}, 1, 64, 1.349),
        ("medusa", {}, 1, 64, 1.156),
        ("medusa", {"vocabulary": "shared"}, 1, 64, 1.104),
    ],
)
def test_steps_with_trees_take_as_many_plain_ones_as_was_measured(kind, shape, batch, nodes, ratio):
    machine = Machine(VICUNA, FIGURES.models[VICUNA], "h200-141gb", FIGURES)
    plain = decode_step(machine, batch, 1, 1000, None)
    step = decode_step(machine, batch, nodes, 1000, heads_cost(kind, **shape))
    assert step.value == pytest.approx(ratio * plain.value) and (plain.basis, step.basis) == ("measured", "derived")
    assert f"{ratio:.2f} of {VICUNA} with {kind} heads at {batch} x {nodes}" in step.how


def test_ratios_speak_for_other_shapes_and_not_for_other_gpus():
    machine = Machine(VICUNA, FIGURES.models[VICUNA], "h200-141gb", FIGURES)
    hydra, medusa = heads_cost("hydra"), heads_cost("medusa")
    for nodes in (8, 16, 64):  # where both kinds were timed
        plain, slow, fast = (
            decode_step(machine, 1, n, 400, c).value for n, c in ((1, None), (nodes, hydra), (nodes, medusa))
        )
        assert plain < fast < slow
    zephyr = "HuggingFaceH4/zephyr-7b-beta"
    other = decode_step(Machine(zephyr, FIGURES.models[zephyr], "h200-141gb", FIGURES), 1, 64, 1000, hydra)
    assert other.basis == "derived" and "hydra heads at 1 x 64" in other.how
    elsewhere = decode_step(replace(machine, gpu_name="h100-80gb"), 1, 64, 1000, hydra)
    assert elsewhere.basis == "estimate" and "plain steps" not in elsewhere.how
    rows = [
        DecodeRow(gpu="h200-141gb", model=VICUNA, batch=1, nodes=64, context=1000, seconds=0.005, source="docs/x.md")
    ]
    told = replace(FIGURES, measured=replace(FIGURES.measured, decode=rows))
    assert decode_step(replace(machine, figures=told), 1, 64, 1000, hydra).value == 0.005  # a measured step comes first


@pytest.mark.parametrize("changes", [{"requests_per_second": 0}, {"reply_tokens": 0}, {"prompt_tokens": -1}])
def test_loads_that_make_no_sense_are_refused(changes):
    with pytest.raises(ConfigError, match="must all be above 0"):
        replace(LOAD, **changes)
