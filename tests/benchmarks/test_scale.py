"""`medusa bench scale`: shares of linear growth, time limits, resuming, and every part on one and two CPU workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from benchmarks.scaling import bench, serving, tensor_parallel, training
from benchmarks.scaling.bench import ScaleBenchmark
from benchmarks.scaling.clients import Answered, requests_of, tokens_per_second
from benchmarks.scaling.config import PARTS, ScaleConfig
from benchmarks.scaling.distilling import Together
from benchmarks.scaling.machine import Machine
from benchmarks.scaling.models import inflated
from benchmarks.scaling.points import CutShort, Deadline, LeftOut, PartTimeout, Point, alarm, of_linear
from benchmarks.scaling.report import SHARED, Part, markdown, shares
from benchmarks.serving import run_engine
from medusa import Engine, SamplingParams
from medusa.checkpoint import BackboneRef, CheckpointMeta, save_checkpoint
from medusa.config import ConfigError
from medusa.heads import HeadsConfig, MedusaHeads
from medusa.model import Backbone

GPUS = Machine("cuda", 4, "Some GPU", 8, "Some CPU", 1, "2", "2", "0")
CPU = replace(GPUS, device="cpu", gpus=0)


def point(workers, *values, series="distil", target=0.95, unit="tokens/s"):
    return Point(series, workers, unit, values, target=target)


def part(*points, machine=GPUS, status="measured", why=""):
    return Part("distill", status, machine, {}, points, why)


def test_shares_are_of_the_one_workers_median():
    points = [point(1, 90.0, 100.0, 110.0), point(2, 180.0, 190.0, 200.0), point(4, 200.0)]
    assert of_linear(points[0], points).median == 1.0
    share = of_linear(points[1], points)
    assert share.median == pytest.approx(190 / 200)
    assert (share.low, share.high) == (pytest.approx(185 / 210), pytest.approx(195 / 190))
    assert of_linear(points[2], points).median == pytest.approx(0.5)
    assert of_linear(points[1], points[1:]) is None
    assert of_linear(point(2, 9.0, target=None), points) is None
    with pytest.raises(ValueError, match="above 0"):
        point(1, 0.0)


def test_the_report_gives_ratios_only_where_workers_have_devices():
    points = (point(1, 100.0), point(2, 190.0))
    assert [(row["workers"], row["median"]) for row in shares(part(*points))] == [(1, 1.0), (2, 0.95)]
    told = markdown([part(*points)])
    assert "| distill | distil | 2 | 190 (190 to 190) | tokens/s | 0.95 (0.95 to 0.95) | 0.95 |" in told
    assert "4 x Some GPU, 8 cores of Some CPU" in told and SHARED not in told
    on_cpu = part(*points, machine=CPU)
    assert shares(on_cpu) == [] and SHARED in markdown([on_cpu])
    assert "| 190 (190 to 190) | tokens/s |  |  |" in markdown([on_cpu])
    assert "- distill: failed. it broke" in markdown([part(status="failed", why="it broke")])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workers": (2, 4)}, "must have 1 among"),
        ({"parts": ("distil",)}, "--parts are of ray, distill"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"concurrency": ()}, "--concurrency"),
        ({"part_limit": 0.0}, "seconds are above 0"),
        ({"joint_method": "none"}, "lora or full"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        ScaleConfig(**changes)


def test_a_part_stops_before_what_does_not_fit():
    deadline = Deadline(100.0)
    deadline.ensure(90.0, "a run")
    with pytest.raises(CutShort, match="no time for a run of 4"):
        deadline.ensure(200.0, "a run of 4")


def test_a_part_that_hangs_is_broken_off_and_an_earlier_timer_goes_on():
    before, _ = signal.getitimer(signal.ITIMER_REAL)  # pytest-timeout's
    with pytest.raises(PartTimeout, match="did not end within"), alarm(0.05):
        time.sleep(30)
    after, _ = signal.getitimer(signal.ITIMER_REAL)
    assert before == 0 or 0 < after < before
    with alarm(float("inf")):
        pass


class Parts:
    """Stands for the parts: what each yields before it ends as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.ends: dict[str, BaseException] = {}
        monkeypatch.setattr(bench, "describe", lambda device: replace(GPUS, device=device or "cuda"))
        monkeypatch.setattr(bench, "_measure_of", lambda name: lambda config, deadline: self.measure(name, config))

    def measure(self, name: str, config: ScaleConfig) -> Iterator[Point]:
        self.calls.append(name)
        for workers in config.workers:
            yield point(workers, 100.0 * workers, series=name)
            if name in self.ends:
                raise self.ends[name]


@pytest.fixture
def parts(monkeypatch):
    return Parts(monkeypatch)


def run(config):
    return {found.name: found for found in ScaleBenchmark(config, nullcontext).run()}


def test_every_part_ends_in_the_file_whatever_becomes_of_it(parts, tmp_path):
    parts.ends = {
        "ray": LeftOut("not here"),
        "distill": CutShort("no time"),
        "medusa-1": RuntimeError("it broke"),
        "serve": ImportError("no fastapi"),
    }
    asked = ("ray", "distill", "medusa-1", "medusa-2", "serve")
    done = run(ScaleConfig(workers=(1, 2), parts=asked, out=tmp_path))
    assert {name: found.status for name, found in done.items()} == {
        "ray": "left out",
        "distill": "cut short",
        "medusa-1": "failed",
        "medusa-2": "measured",
        "serve": "left out",
    }
    written = json.loads((tmp_path / "scale.json").read_text())["parts"]
    assert [content["name"] for content in written] == list(asked)
    assert [len(content["points"]) for content in written] == [1, 1, 1, 2, 1]
    assert written[3]["of_linear"][1]["median"] == 1.0 and "it broke" in written[2]["why"]
    assert (tmp_path / "scale.png").stat().st_size > 1000 and "no time" in (tmp_path / "scale.md").read_text()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_measured_is_kept_and_the_rest_goes_on(parts, tmp_path):
    parts.ends = {"distill": CutShort("no time")}
    config = ScaleConfig(workers=(1, 2), parts=("distill", "serve"), out=tmp_path)
    run(config)
    parts.ends = {}
    done = run(config)
    assert parts.calls == ["distill", "serve", "distill"] and done["distill"].status == "measured"
    run(replace(config, parts=("medusa-1",)))
    assert set(run(config)) == {"distill", "medusa-1", "serve"}  # parts that were not asked for stay
    assert parts.calls[3:] == ["medusa-1"]
    run(replace(config, again=True))
    run(replace(config, rows=7, parts=("serve",)))
    assert parts.calls[4:] == ["distill", "serve", "serve"]


def test_a_run_that_is_killed_leaves_the_points_so_far(parts, tmp_path):
    parts.ends = {"serve": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run(ScaleConfig(workers=(1, 2), parts=("serve",), out=tmp_path))
    (left,) = json.loads((tmp_path / "scale.json").read_text())["parts"]
    assert left["status"] == "cut short" and left["why"] == "the run ended here" and len(left["points"]) == 1


def test_more_workers_than_gpus_are_refused(parts, tmp_path):
    with pytest.raises(ConfigError, match="8 workers take 8 GPUs, one each; this cluster has 4"):
        run(ScaleConfig(workers=(1, 8), out=tmp_path))
    run(ScaleConfig(workers=(1, 8), out=tmp_path, device="cpu"))
    assert parts.calls == list(PARTS)


def test_a_budget_is_shared_out_among_the_parts(parts, tmp_path):
    told: list[str] = []
    config = ScaleConfig(parts=("distill", "serve", "ray"), time_budget=300.0, part_limit=120.0, out=tmp_path)
    ScaleBenchmark(config, nullcontext, told.append).run()
    assert [line for line in told if "at most" in line] == [
        "ray: 100 s at most",
        "distill: 120 s at most",  # what the first left is shared out again
        "serve: 120 s at most",
    ]


def test_a_budget_that_is_spent_leaves_what_there_was(parts, tmp_path):
    config = ScaleConfig(workers=(1, 2), parts=("distill",), out=tmp_path)
    run(config)
    done = run(replace(config, parts=("distill", "serve"), again=True, time_budget=1e-6))
    assert done["distill"].status == "measured" and len(done["distill"].points) == 2
    assert (done["serve"].status, done["serve"].why) == ("cut short", "no time was left for it")
    assert parts.calls == ["distill"]


def test_a_load_counts_all_clients_from_the_first_start_to_the_last_end():
    answered = [Answered(10.0, 0.5, 12.0, 30), Answered(11.0, 0.5, 15.0, 70)]
    assert tokens_per_second(answered) == pytest.approx(20.0)
    requests = requests_of([[1], [2], [3], [4]], 10)
    assert requests == requests_of([[1], [2], [3], [4]], 10) and len({r.reply_tokens for r in requests}) > 1
    assert all(5 <= request.reply_tokens <= 15 for request in requests)


def test_no_run_of_the_service_repeats_the_prompts_of_another(make_backbone_dir):
    config = ScaleConfig(model=str(make_backbone_dir("llama")), prompt_tokens=8, repeats=3)
    places = [(concurrency, run) for concurrency in (1, 2, 4) for run in range(4)]
    asked = [serving._requests(config, 8, *place) for place in places]
    assert len({tuple(request.prompt_ids) for requests in asked for request in requests}) == 8 * len(places)
    assert len({tuple(request.reply_tokens for request in requests) for requests in asked}) == 1  # the same work


def test_tensor_parallelism_is_left_out_where_the_engine_has_none(monkeypatch):
    def without(cls, backbone, heads=None, *, device=None): ...

    monkeypatch.setattr(Engine, "from_pretrained", classmethod(without))
    with pytest.raises(LeftOut, match="no option tensor_parallel"):
        next(tensor_parallel.tensor_parallel(ScaleConfig(), Deadline(9.0)))


def test_a_model_that_one_device_does_not_hold_is_measured_on_two(monkeypatch):
    def with_option(cls, backbone, heads=None, *, tensor_parallel=1): ...

    def in_new_process(function, config, workers):
        if workers == 1:
            raise RuntimeError("out of memory")
        return {1: (10.0 * workers, 10.0 * workers)}

    monkeypatch.setattr(Engine, "from_pretrained", classmethod(with_option))
    monkeypatch.setattr(tensor_parallel, "in_new_process", in_new_process)
    found = tensor_parallel.tensor_parallel(ScaleConfig(workers=(1, 2), device="cuda"), Deadline(9.0))
    first = next(found)
    assert (first.workers, first.values) == (2, (20.0, 20.0)) and not first.told
    with pytest.raises(CutShort, match=r"1 device\(s\) failed: out of memory"):
        next(found)


def test_tensor_parallel_speed_stands_beside_one_devices(monkeypatch):
    def with_option(cls, backbone, heads=None, *, tensor_parallel=1): ...

    monkeypatch.setattr(Engine, "from_pretrained", classmethod(with_option))
    monkeypatch.setattr(tensor_parallel, "in_new_process", lambda function, config, workers: {1: (10.0 + workers,)})
    one, two = tensor_parallel.tensor_parallel(ScaleConfig(workers=(1, 2), device="cuda"), Deadline(9.0))
    assert not one.told and two.told == {"times one device": pytest.approx(12 / 11)}


def test_no_run_of_one_engine_repeats_the_prompts_of_another(make_backbone_dir, monkeypatch):
    runs = []

    def keep(engine, questions, concurrency):
        runs.append({tuple(question.prompt_ids) for question in questions})
        return run_engine(engine, questions, concurrency)

    monkeypatch.setattr(tensor_parallel, "run_engine", keep)
    given = ScaleConfig(model=str(make_backbone_dir("llama")), device="cpu", concurrency=(1, 2), repeats=2)
    speeds = tensor_parallel.measure(replace(given, prompt_tokens=8, reply_tokens=4), 1)
    assert {at_once: len(values) for at_once, values in speeds.items()} == {1: 2, 2: 2}
    assert [len(run) for run in runs] == [2, 2, 2, 2, 4, 4]
    assert len(set.union(*runs)) == sum(map(len, runs))


def test_an_inflated_model_is_written_once_for_all_workers_and_says_the_same(make_backbone_dir, tmp_path):
    small = make_backbone_dir("llama")
    prompts, params = [[5, 6, 7, 8]], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    asked = ScaleConfig(model=str(small), inflate="tiny-test", dtype="float32", out=tmp_path)
    config = inflated(asked)
    engines = [Engine.from_pretrained(model, device="cpu") for model in (small, config.model)]
    assert engines[1].backbone.hidden_size == 320
    first, second = (engine.generate(prompts, params)[0].token_ids for engine in engines)
    assert first == second
    written = (Path(config.model) / "config.json").stat().st_mtime_ns
    assert inflated(asked) == config and (Path(config.model) / "config.json").stat().st_mtime_ns == written
    assert inflated(replace(asked, inflate=None)).model == str(small)
    with pytest.raises(ConfigError, match="--inflate nothing: no shape"):
        inflated(replace(asked, inflate="nothing"))


def test_inflated_heads_belong_to_the_inflated_model(make_backbone_dir, tmp_path):
    small = make_backbone_dir("llama")
    backbone = Backbone.from_pretrained(small, dtype=torch.float32, device="cpu")
    shape = HeadsConfig(num_heads=2, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
    heads = MedusaHeads.initialised(shape, backbone.lm_head_weight)
    reference = BackboneRef(name=backbone.name, weights_digest=backbone.digest)
    save_checkpoint(tmp_path / "heads", heads, CheckpointMeta.of(heads, reference))
    asked = ScaleConfig(
        model=str(small), heads=str(tmp_path / "heads"), inflate="tiny-test", dtype="float32", out=tmp_path / "out"
    )
    config = inflated(asked)
    engine = Engine.from_pretrained(config.model, config.heads, device="cpu", speculation="off")
    assert engine.checkpoint is not None and engine.checkpoint.config.hidden_size == 320


@pytest.fixture(scope="module")
def tiny(tiny_llama) -> ScaleConfig:
    return ScaleConfig(
        workers=(1, 2),
        model=str(tiny_llama),
        device="cpu",
        dtype="float32",
        repeats=1,
        max_batch_size=4,
        rows=6,
        reply_tokens=8,
        rows_per_block=2,
        batch=2,
        length=32,
        num_heads=2,
        steps=1,
        concurrency=(2,),
        prompt_tokens=6,
        upscale_delay_s=0.5,
    )


def measured(name: str, config: ScaleConfig) -> dict[tuple[str, int], Point]:
    return {(found.series, found.workers): found for found in bench._measure_of(name)(config, Deadline(240.0))}


@pytest.mark.slow
@pytest.mark.ray
def test_a_part_that_waits_for_ray_is_broken_off(ray_cluster):
    together = ray.remote(num_cpus=0)(Together).remote(2)
    with pytest.raises(PartTimeout), alarm(1.0):
        ray.get(together.arrive.remote())
    ray.get(together.arrive.remote())  # the second has come: Ray works on, and so does the meeting


@pytest.mark.slow
@pytest.mark.ray
def test_one_and_two_actors_distil(ray_cluster, tiny):
    points = measured("distill", tiny)
    assert set(points) == {("distil", 1), ("distil", 2)}
    for (_, workers), found in points.items():
        assert found.told["rows"] == 6 * workers and found.values[0] > 0
        assert found.told["rows/s"][0] <= found.values[0]


@pytest.mark.slow
@pytest.mark.ray
def test_two_sharded_workers_are_timed_window_by_window(ray_cluster, tiny):
    job = training._job(replace(tiny, repeats=2), "fsdp", 2, joint=False, seconds=240.0)
    assert job.trainer.batch_size == 4 and job.trainer.max_steps == training.WARM_UP + 2
    found = training._fit(job, 2)
    assert len(found.tokens_per_second) == 2 and min(found.tokens_per_second) > 0
    assert found.peak_memory_gib is None


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["medusa-1", "medusa-2"])
def test_one_and_two_workers_train(ray_cluster, tiny, name):
    points = measured(name, replace(tiny, repeats=2))
    assert set(points) == {(f"{name} {kind}", workers) for kind in ("ddp", "fsdp") for workers in (1, 2)}
    assert points[f"{name} ddp", 1].values == points[f"{name} fsdp", 1].values
    assert points[f"{name} ddp", 2].values != points[f"{name} fsdp", 2].values
    assert all(len(found.values) == 2 for found in points.values())


@pytest.mark.ray
@pytest.mark.slow
def test_one_and_two_replicas_serve_and_a_jump_brings_the_second(ray_cluster, tiny):
    points = measured("serve", tiny)
    assert set(points) == {("serve, 2 at once a replica", 1), ("serve, 2 at once a replica", 2)}
    for (_, workers), found in points.items():
        assert found.told["requests"] == 2 * workers * 4
        assert 0 < found.told["first token median, s"] <= found.told["first token p95, s"]
    jump = measured("autoscale", replace(tiny, concurrency=(4,), reply_tokens=32))
    first, everyone = (jump[f"load jump to token of {whose}", 2] for whose in ("first new replica", "all replicas"))
    assert first.values == everyone.values and first.values[0] > tiny.upscale_delay_s


@pytest.mark.ray
@pytest.mark.slow
def test_rays_own_cost_is_measured(ray_cluster, tiny):
    points = measured("ray", tiny)
    assert {series for series, _ in points} == {
        "driver, a block",
        "proxy, a request of one chunk",
        "proxy, a further chunk",
    }
    for found in points.values():
        assert 0 < found.values[0] < 1
    assert points["proxy, a further chunk", 1].values[0] < points["proxy, a request of one chunk", 1].values[0]


@pytest.mark.ray
@pytest.mark.slow
def test_the_command_runs_without_the_packages_that_it_does_not_need(tiny_llama, tmp_path):
    """On a machine that has torch, transformers and ray, and no MLflow, say."""
    for package in ("mlflow", "sqlalchemy", "openai", "datasets", "matplotlib"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('not installed here')\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])}
    sizes = ["--workers", "1", "--rows", "6", "--reply-tokens", "8", "--batch", "2", "--length", "32", "--steps", "1"]
    asked = ["--parts", "distill,medusa-1", "--model", tiny_llama, "--repeats", "1", "--device", "cpu"]
    command = [sys.executable, "-m", "cli.bench_scale", *sizes, *asked, "--out", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "out" / "scale.json").read_text())["parts"]
    assert [(content["name"], content["status"]) for content in parts] == [
        ("distill", "measured"),
        ("medusa-1", "measured"),
    ]
    assert "cores of" in (tmp_path / "out" / "scale.md").read_text() and SHARED.split()[0] in done.stdout
