"""Simulated growth against closed forms: one is one, free communication is linear, and each limit alone is itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from medusa.config import ConfigError
from medusa.heads import HeadsConfig
from pipelines.plan.collectives import Network, all_gather, all_reduce
from pipelines.plan.data_parallel import BUCKET, StepWork, backward_share, ddp_step, fsdp_step, step_work
from pipelines.plan.figures import RepliesRow, load_figures
from pipelines.plan.parallel_work import Engines, distil, serve
from pipelines.plan.scaling import Question, limits, plan_scaling, reply_lengths
from pipelines.plan.shapes import HeadsCost
from pipelines.plan.speed import Machine, decode_step
from pipelines.plan.training import Recipe

FIGURES = load_figures()
VICUNA = "lmsys/vicuna-7b-v1.5"
SHAPE = FIGURES.models[VICUNA]
NETWORK = Network(node_gpus=8, inside=300e9, across=50e9)
WORK = StepWork(seconds=0.5, backward_share=0.2, gradients=2e9, root=2e9, layers=0.0, num_layers=32, passes=0)
SMALL = Question(gpus=(1, 2, 4), rows=64, batch=8, rows_per_block=8)


def constant(seconds):
    return lambda batch: seconds


def test_a_ring_moves_its_share_of_the_bytes_over_every_link():
    assert all_gather(1e9, 1, NETWORK) == all_reduce(1e9, 1, NETWORK) == 0
    assert all_gather(3e9, 4, NETWORK) == pytest.approx(0.75 * 3e9 / 300e9)
    assert all_reduce(3e9, 4, NETWORK) == pytest.approx(2 * 0.75 * 3e9 / 300e9)
    two_nodes = 7 / 8 * 3e9 / 300e9 + 1 / 2 * 3e9 / 8 / 50e9  # each GPU carries an eighth across
    assert all_gather(3e9, 16, NETWORK) == pytest.approx(two_nodes)
    assert all_gather(0.0, 16, replace(NETWORK, latency=1e-3)) == pytest.approx(2e-3)
    one_a_node = replace(NETWORK, node_gpus=1)
    assert all_gather(3e9, 4, one_a_node) == pytest.approx(0.75 * 3e9 / 50e9)
    with pytest.raises(ValueError, match="12 GPUs do not fill nodes of 8"):
        all_gather(1.0, 12, NETWORK)


@pytest.mark.parametrize("step", [ddp_step, fsdp_step])
def test_one_gpu_and_free_links_are_linear(step):
    assert step(WORK, 1, NETWORK).share == 1.0
    free = Network(node_gpus=8, inside=float("inf"), across=float("inf"))
    assert step(replace(WORK, layers=13e9, passes=3), 64, free).share == 1.0
    slow, fast = (step(WORK, 16, replace(NETWORK, across=rate)).share for rate in (5e9, 50e9))
    assert 0 < slow < fast < 1


def test_ddp_hides_all_but_the_last_bucket_in_the_backward():
    one_bucket = replace(WORK, gradients=float(BUCKET))
    alone = ddp_step(one_bucket, 8, NETWORK)
    assert alone.exposed == alone.communication == pytest.approx(2 * 7 / 8 * BUCKET / 300e9)
    many = ddp_step(replace(WORK, gradients=10.0 * BUCKET), 8, NETWORK)
    assert many.communication == pytest.approx(10 * alone.communication)
    assert many.exposed == pytest.approx(alone.communication)
    no_backward = ddp_step(replace(WORK, backward_share=0.0), 8, NETWORK)
    assert no_backward.exposed == pytest.approx(all_reduce(2e9, 8, NETWORK))
    assert no_backward.share == pytest.approx(0.5 / (0.5 + 2 * 7 / 8 * 2e9 / 300e9))


def test_fsdp_streams_layers_and_waits_for_the_root():
    heads_only = fsdp_step(WORK, 8, NETWORK)
    assert heads_only.exposed == heads_only.communication == pytest.approx(2 * all_gather(2e9, 8, NETWORK))
    streamed = fsdp_step(replace(WORK, layers=3.2e9, passes=3), 8, NETWORK)
    assert streamed.communication - heads_only.communication == pytest.approx(3 * all_gather(3.2e9, 8, NETWORK))
    assert streamed.exposed - heads_only.exposed == pytest.approx(all_gather(1e8, 8, NETWORK))
    bound = fsdp_step(replace(WORK, layers=3.2e9, passes=3, seconds=1e-3), 8, NETWORK)
    assert bound.seconds + bound.exposed == pytest.approx(bound.communication)


def test_what_travels_is_what_learns():
    heads = HeadsConfig(hidden_size=4096, vocab_size=32000, num_heads=4)
    own = HeadsCost.of(heads).parameters
    first = step_work(SHAPE, Recipe(heads=heads), 1000, 500.0, 0.4)
    assert (first.seconds, first.gradients, first.layers) == (2.0, 4 * own, 0.0)
    lora = Recipe(heads=heads, method="lora", distils=True, checkpointing=True)
    joint = step_work(SHAPE, lora, 1000, 500.0, 0.4)
    assert joint.gradients == 4 * (own + SHAPE.lora_parameters(32)) and joint.passes == 3
    assert joint.layers == 2 * SHAPE.layer_parameters + 4 * SHAPE.lora_parameters(32)
    assert 0 < backward_share(SHAPE, Recipe(heads=heads), 0.4) < 0.1 < backward_share(SHAPE, lora, 0.4) < 1
    full = step_work(SHAPE, Recipe(heads=heads, method="full"), 1000, 500.0, 0.4)
    assert full.gradients == pytest.approx(4 * (own + SHAPE.parameters), rel=1e-4)


def test_one_engine_takes_what_its_steps_and_prompts_take():
    alone = Engines(constant(0.01), prefill_seconds=0.05, max_batch=1)
    done = distil(alone, 1, [20] * 12, 4, blocks_in_flight=2)
    assert done.tokens_per_second == pytest.approx(20 / (0.05 + 20 * 0.01)) and done.idle_share == pytest.approx(0)
    batched = Engines(lambda batch: 0.01 * (1 + batch), prefill_seconds=0.0, max_batch=4)
    assert distil(batched, 1, [20] * 12, 4, blocks_in_flight=3).tokens_per_second == pytest.approx(4 / 0.05)
    shrinking = distil(batched, 1, [10, 20], 2, blocks_in_flight=1)  # ten steps of two, then ten of one
    assert shrinking.tokens_per_second == pytest.approx(30 / (10 * 0.03 + 10 * 0.02))


def test_equal_replies_without_dispatch_are_linear():
    engines = Engines(lambda batch: 0.01 * (1 + batch), prefill_seconds=0.02, max_batch=4)
    one = distil(engines, 1, [20] * 32, 4, blocks_in_flight=3)
    eight = distil(engines, 8, [20] * 256, 4, blocks_in_flight=3)
    assert eight.tokens_per_second == pytest.approx(8 * one.tokens_per_second)
    assert eight.idle_share == pytest.approx(0, abs=1e-9)


def test_tails_and_the_head_keep_distillation_from_it():
    engines = Engines(constant(0.01), prefill_seconds=0.0, max_batch=4)
    ragged = [5, 100] * 64
    one, eight = (distil(engines, n, ragged * n, 4, blocks_in_flight=3) for n in (1, 8))
    assert eight.tokens_per_second <= 8 * one.tokens_per_second * (1 + 1e-9)
    coarse = distil(engines, 8, ragged, 32, blocks_in_flight=1)  # four blocks for eight actors
    assert coarse.idle_share >= 0.5
    bound = distil(engines, 8, [20] * 256, 4, blocks_in_flight=3, dispatch_seconds=10.0)
    assert bound.tokens_per_second == pytest.approx(4 * 20 / 10.0, rel=0.01) and bound.dispatch_share > 0.99


def test_clients_that_do_not_meet_are_served_linearly():
    engines = Engines(constant(0.01), prefill_seconds=0.0, max_batch=10**6)
    for replicas in (1, 4):
        served = serve(engines, replicas, [20] * 400, at_once=5)
        assert served.tokens_per_second == pytest.approx(5 * replicas / 0.01, rel=0.03)
        assert served.proxy_share == 0


def test_a_slow_proxy_gives_a_reply_at_a_time_and_a_second_one_twice_that():
    engines = Engines(constant(0.01), prefill_seconds=0.0, max_batch=64)
    bound = serve(engines, 4, [20] * 2000, 32, proxy_seconds=0.05)
    assert bound.tokens_per_second == pytest.approx(20 / 0.05, rel=0.02) and bound.proxy_share == pytest.approx(1)
    two = serve(engines, 4, [20] * 2000, 32, proxies=2, proxy_seconds=0.05)
    assert two.tokens_per_second == pytest.approx(2 * bound.tokens_per_second, rel=0.03)


def test_two_choices_are_more_even_than_one():
    engines = Engines(lambda batch: 0.01 + 0.0005 * batch, prefill_seconds=0.01, max_batch=32)
    lengths = [5, 10, 20, 40, 80] * 800
    one, two = (serve(engines, 16, lengths, 16, choices=choices) for choices in (1, 2))
    assert 1 <= two.imbalance < one.imbalance
    assert two.tokens_per_second > one.tokens_per_second
    with pytest.raises(ValueError, match="too few for 64 clients"):
        serve(engines, 4, [10] * 64, 16)


def test_replies_are_spread_as_measured_around_the_mean_that_is_asked_for():
    rows = [RepliesRow(model="x", deciles=[0, 10, 10, 20, 20, 30, 30, 40, 60, 80, 200], source="here")]
    figures = replace(FIGURES, measured=replace(FIGURES.measured, replies=rows))
    lengths = reply_lengths(figures, SMALL, 20_000)
    assert sum(lengths) / len(lengths) == pytest.approx(200, rel=0.03)
    assert max(lengths) > 900 and min(lengths) == 1 and lengths == reply_lengths(figures, SMALL, 20_000)
    with pytest.raises(ValueError, match="11 rising lengths"):
        replace(rows[0], deciles=[3, 2, 1])


def test_a_plan_starts_at_one_and_names_every_input():
    plan = plan_scaling(VICUNA, SHAPE, "h200-141gb", FIGURES, SMALL)
    one = plan.rows[0]
    assert one.gpus == 1 and one.distil == 1.0 and {step.share for step in one.training.values()} == {1.0}
    assert all(0.5 < row.distil < 1.05 for row in plan.rows)
    for row in plan.rows:
        for worst, best in (row.one_proxy, row.proxy_a_node):
            assert 0 < worst <= best * 1.02 and best < 1.1
        assert len(limits(row)) == 2 + len(row.training)
    assert {"hydra ddp", "hydra fsdp", "medusa-2 ddp", "medusa-2 fsdp"} == set(one.training)
    assert all(figure.how and figure.value > 0 for figure in plan.inputs.values())
    assert plan.inputs["step of 8 replies, s"].basis == "derived"
    assert plan.inputs["proxy, CPU s a reply, all threads"].basis == "derived"  # of requests and chunks, measured apart
    assert plan.inputs["reply, mean tokens"].basis == "estimate"  # what was asked for
    assert plan_scaling(VICUNA, SHAPE, "h200-141gb", FIGURES, SMALL) == plan


def test_hydra_is_what_grows_unless_medusa_1_is_asked_for():
    hydra, medusa = (
        plan_scaling(VICUNA, SHAPE, "h200-141gb", FIGURES, question)
        for question in (SMALL, replace(SMALL, heads="medusa"))
    )
    assert set(medusa.rows[0].training) == {"medusa-1 ddp", "medusa-1 fsdp", "medusa-2 ddp", "medusa-2 fsdp"}
    assert medusa.basis["medusa-1"] == medusa.basis["medusa-2"] == "measured"  # this very recipe's speed
    assert hydra.basis["hydra"] == hydra.basis["medusa-2"] == "derived"
    sent = [plan.rows[-1].training["medusa-2 ddp"].communication for plan in (hydra, medusa)]
    assert sent[0] > 1.2 * sent[1]  # ten matrices more for the tokens that its heads see
    slower = [plan.inputs[f"{name}, tokens/s"].value for plan, name in ((hydra, "hydra"), (medusa, "medusa-1"))]
    assert slower[0] < slower[1] and hydra.rows[-1].distil == medusa.rows[-1].distil


def test_slower_links_and_more_chunks_cost_their_part():
    two_nodes = replace(SMALL, gpus=(16,), node_gpus=8)
    infiniband, ethernet = (
        plan_scaling(VICUNA, SHAPE, "h200-141gb", FIGURES, replace(two_nodes, across=link)).rows[0]
        for link in ("ndr-400", "ethernet-100")
    )
    assert ethernet.training["hydra fsdp"].share < infiniband.training["hydra fsdp"].share
    assert ethernet.distil == infiniband.distil
    merged = plan_scaling(VICUNA, SHAPE, "h200-141gb", FIGURES, replace(two_nodes, merge_chunks_s=0.5)).rows[0]
    assert merged.served_by_one.worst.proxy_share < infiniband.served_by_one.worst.proxy_share


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": (128,)}, "GPUs at most 64"),
        ({"gpus": (12,)}, "12 GPUs do not fill nodes of 8"),
        ({"batch": 0}, "batch"),
        ({"heads": "joint"}, "hydra or medusa"),
        ({"vocabulary": "truncated"}, "own or shared"),
    ],
)
def test_questions_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        replace(SMALL, **changes)


def test_an_unknown_link_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match="no figures of the link 'string'; known are nvlink-4"):
        plan_scaling(VICUNA, SHAPE, "h200-141gb", FIGURES, replace(SMALL, inside="string"))


def test_a_measured_step_speaks_as_it_is_only_for_its_own_context():
    machine = Machine(VICUNA, SHAPE, "h200-141gb", FIGURES)
    here = decode_step(machine, 64, 1, 1000, None)
    assert (here.value, here.basis) == (0.012042, "measured")
    shorter = decode_step(machine, 64, 1, 400, None)
    assert shorter.basis == "derived" and shorter.value < here.value
