"""The decode benchmark on tiny models: what it counts, that all contenders decode the same, and what it leaves."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import hardware
from benchmarks.contenders import EngineContender, HuggingFaceContender, Run
from benchmarks.decoding import DecodeBenchmark, DecodeConfig
from benchmarks.measure import Interval, rotated_runs, summarise
from benchmarks.planning import Estimate, plan
from benchmarks.results import markdown, write_atomically
from benchmarks.typical import distance_from_exact, divergence
from benchmarks.workload import Request, encode, pick_prompts, reply_lengths, waves_of, with_context
from cli.main import app
from medusa import Engine, SamplingParams, Typical
from medusa.checkpoint import load_checkpoint, save_checkpoint
from medusa.config import ConfigError
from medusa.hydra import HydraHeads
from medusa.model import Backbone
from tests.medusa.engine.support import TREES, build_engine, checkpoint_of, hugging_face, load, load_reference

ROOT = Path(__file__).resolve().parent.parent.parent
QUESTIONS = ["How many foxes?", "What is the capital of France?", "Explain water.", "def fibonacci(n):", "Who boils?"]


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    return path


@pytest.fixture(scope="module")
def heads(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone, _ = load(tiny_llama)
    checkpoint = checkpoint_of(backbone, trees=[TREES[4], TREES[16]], vocabulary="own")
    folder = tmp_path_factory.mktemp("bench") / "heads"
    save_checkpoint(folder, checkpoint.heads, checkpoint.meta)
    return folder


def requests_of(lengths: list[int]) -> list[Request]:
    return [Request([7 + i, 8, 9 + i], i, {0.0: length}) for i, length in enumerate(lengths)]


# The workload


def test_prompts_are_picked_evenly_and_known_ones_left_out(prompt_file: Path, tmp_path: Path) -> None:
    known = tmp_path / "known.jsonl"
    known.write_text(json.dumps({"prompt": QUESTIONS[1]}) + "\n")
    assert [p.turns[0] for p in pick_prompts(prompt_file, None, 2)] == [QUESTIONS[0], QUESTIONS[2]]
    assert [p.turns[0] for p in pick_prompts(prompt_file, known, 99)] == [QUESTIONS[i] for i in (0, 2, 3, 4)]
    with pytest.raises(ConfigError, match="no prompt left"):
        pick_prompts(known, known, 3)


def test_a_context_is_filled_with_earlier_conversations(tiny_llama: Path, prompt_file: Path) -> None:
    engine = build_engine(tiny_llama, heads=False)
    questions = encode(pick_prompts(prompt_file, None, 5), engine.tokenizer, 400)
    filled = with_context(engine, questions, 150, 10, lambda n: None)
    for question, ids in zip(questions, filled, strict=True):
        assert len(ids) == 150
        assert ids[0] == question.prompt_ids[0]
        assert engine.tokenizer.decode(ids).endswith(engine.tokenizer.decode(question.prompt_ids))
    assert len({tuple(ids) for ids in filled}) == 5
    assert with_context(engine, questions, 3, 10, lambda n: None) == [q.prompt_ids for q in questions]


def test_lengths_are_of_plain_replies_cut_at_loops(tiny_llama: Path, monkeypatch) -> None:
    engine = build_engine(tiny_llama, heads=False)
    prompts = [[7, 8, 9], [11, 12]]
    monkeypatch.setattr("benchmarks.workload.cut_at_loop", lambda ids: len(ids) - 3)
    counted: list[int] = []
    requests = reply_lengths(engine, prompts, [0.0, 0.7], 12, counted.append)
    plain = hugging_face(tiny_llama, prompts, 12, eos_token_id=2)
    assert [r.lengths[0.0] for r in requests] == [max(8, len(reply) - 3) for reply in plain]
    assert set(requests[0].lengths) == {0.0, 0.7} and sum(counted) == 4
    params = requests[0].params(0.7)
    assert (params.max_tokens, params.temperature, params.ignore_eos) == (requests[0].lengths[0.7], 0.7, True)
    assert requests[0].params(0.7, 4).max_tokens == 4


def test_waves_group_replies_of_similar_length_and_repeat_only_where_they_must() -> None:
    requests = requests_of([9, 3, 7, 5, 8, 2, 6, 4])
    waves = waves_of(requests, 0.0, 2, 3)
    assert [[r.lengths[0.0] for r in wave] for wave in waves] == [[2, 3], [5, 6], [7, 8]]
    assert [r.lengths[0.0] for r in waves_of(requests, 0.0, 4, 1)[0]] == [4, 5, 6, 7]  # the middle
    assert [len(wave) for wave in waves_of(requests, 0.0, 4, 3)] == [4, 4, 4]
    (many,) = waves_of(requests, 0.0, 12, 1)
    assert len(many) == 12 and len({(tuple(r.prompt_ids), r.seed) for r in many}) == 12


# Contenders


def test_the_engine_decodes_exactly_the_asked_lengths_and_counts_them(tiny_llama: Path) -> None:
    engine = build_engine(tiny_llama, trees=[TREES[4]])
    waves = waves_of(requests_of([6, 9, 4, 12]), 0.0, 2, 2)
    plain = EngineContender("plain", "plain", 0.0, engine, lambda e: e.set_speculation("off")).run(waves)
    assert (plain.tokens, plain.tokens_per_step) == (31, 1.0)
    assert plain.replies_steps == 31 - 4
    # A prefill's step may decode too: what it gave is no part of the timed tokens.
    assert plain.replies_tokens - 4 <= plain.decode_tokens <= plain.replies_tokens
    assert 4 - 2 + 9 - 2 <= len(plain.full_steps) <= 4 - 1 + 9 - 1 and set(plain.nodes) == {1}
    tree = EngineContender("tree", "plain", 0.0, engine, lambda e: e.set_speculation(4)).run(waves)
    assert tree.tokens == 31 and set(tree.nodes) == {4}
    assert tree.tokens_per_step == tree.replies_tokens / tree.replies_steps >= 1.0
    assert EngineContender("short", "", 0.0, engine, lambda e: e.set_speculation("off")).run(waves, 3).tokens == 12


def test_hugging_face_decodes_the_same_tokens_left_padded(tiny_llama: Path) -> None:
    model = load_reference(tiny_llama)
    requests = [Request([7, 8, 9, 10, 11], 0, {0.0: 9}), Request([12, 13], 1, {0.0: 6})]
    outputs = []
    generate = model.generate

    def spy(*arguments, **options):
        outputs.append(generate(*arguments, **options))
        return outputs[-1]

    model.generate = spy
    try:
        run = HuggingFaceContender("hf", "", model).run([requests])
    finally:
        del model.generate
    expected = hugging_face(tiny_llama, [r.prompt_ids for r in requests], 9, eos_token_id=None)
    assert [row[5:].tolist() for row in outputs[0]] == expected
    assert (run.tokens, run.decode_tokens) == (15, 13)
    assert run.tokens_per_step == 1.0 and run.replies_steps == 2 * 8


def test_assisted_generation_counts_the_models_own_steps(tiny_llama: Path) -> None:
    model = load_reference(tiny_llama)
    draft = copy.deepcopy(model)
    run = HuggingFaceContender("assisted", "", model, draft).run([[Request([7, 8, 9], 0, {0.0: 20})]])
    assert run.tokens == 20 and run.tokens_per_step > 1.5  # its own draft is always right


# Measuring


def test_an_interval_is_the_median_between_the_quartiles() -> None:
    assert Interval.of([1.0, 20.0, 4.0, 3.0, 2.0]) == Interval(3.0, 2.0, 4.0)
    assert Interval.where_measured([None, 7.0]) == Interval(7.0, 7.0, 7.0)
    assert Interval.where_measured([None]) is None


def test_runs_rotate_and_rows_pair_each_run_with_plain(tiny_llama: Path) -> None:
    engine = build_engine(tiny_llama, trees=[TREES[4]])
    contenders = [
        EngineContender("plain", "plain", 0.0, engine, lambda e: e.set_speculation("off")),
        EngineContender("tree", "plain", 0.0, engine, lambda e: e.set_speculation(4)),
    ]
    said: list[str] = []
    planned = plan(Estimate(1.0), 2, 4, 3, None)
    assert (planned.waves, planned.repeats, planned.note) == (2, 3, None)
    runs = rotated_runs(contenders, requests_of([5, 6, 7, 8]), 2, planned, said.append)
    assert [line.rsplit(" ", 1)[1] for line in said] == ["plain", "tree", "tree", "plain", "plain", "tree"]
    plain, tree = summarise(contenders, runs, 2, planned)
    assert plain.ratio is None and (plain.requests, plain.repeats) == (4, 3)
    ratios = [t.tokens_per_second / p.tokens_per_second for p, t in zip(runs["plain"], runs["tree"], strict=True)]
    assert tree.ratio == Interval.of(ratios)
    assert tree.ratio.low <= tree.ratio.median <= tree.ratio.high
    assert (tree.nodes, tree.speculating, plain.speculating) == (4.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("budget", "waves", "repeats", "noted"),
    [(None, 8, 5, False), (1000.0, 8, 5, False), (21.0, 2, 5, True), (8.0, 1, 4, True), (0.0, 1, 3, True)],
)
def test_the_budget_decides_how_many_prompts_run_and_says_so(budget, waves, repeats, noted) -> None:
    planned = plan(Estimate(2.0), 4, 32, 5, budget)
    assert (planned.waves, planned.repeats, planned.note is not None) == (waves, repeats, noted)
    assert planned.seconds == waves * repeats * 2.0


def test_idle_time_is_what_no_operation_covers() -> None:
    assert hardware.idle_part([(0, 2), (1, 3), (5, 6), (5.5, 10)]) == pytest.approx(0.2)
    assert hardware.idle_part([(0, 10), (2, 3)]) == 0.0
    assert hardware.idle_part([]) is None


def test_bytes_of_a_step(tiny_llama: Path) -> None:
    backbone, _ = load(tiny_llama)
    embedding = backbone.model.get_input_embeddings().weight
    everything = sum(p.nbytes for p in backbone.model.parameters())
    tied = embedding is backbone.lm_head_weight
    assert hardware.weight_bytes(backbone) == everything - (0 if tied else embedding.nbytes)
    assert hardware.kv_bytes_per_token(backbone) == 2 * 2 * 2 * 16 * 4  # key and value, layers, heads, size, float32
    own = checkpoint_of(backbone, vocabulary="own").heads
    shared = checkpoint_of(backbone, vocabulary="shared").heads
    matrix = backbone.lm_head_weight.nbytes
    blocks = 4 * (64 * 64 + 64) * 4
    assert hardware.heads_bytes(own, backbone) == blocks + 4 * matrix
    assert hardware.heads_bytes(shared, backbone) == blocks + matrix
    hydra = HydraHeads.initialised(shared.config, backbone.lm_head_weight)
    paths = ((2 + 3 + 4 + 5) * 64 * 64 + 4 * 64) * 4
    assert hardware.heads_bytes(hydra, backbone) == paths + 4 * matrix  # one head after another


def test_the_copy_rate_is_of_this_machine(monkeypatch) -> None:
    monkeypatch.setitem(hardware.COPY_BYTES, "cpu", 2**20)
    assert 1e8 < hardware.copy_rate(torch.device("cpu")) < 1e13


# Typical acceptance


def test_divergence_by_hand() -> None:
    logprobs = [math.log(0.5), math.log(0.25), math.log(0.25)]
    assert divergence([1], logprobs) == pytest.approx(math.log(4))
    assert divergence([0, 0, 1, 2], logprobs) == pytest.approx(0.0)
    assert divergence([0, 1], logprobs) == pytest.approx(0.5 * math.log(1) + 0.5 * math.log(2))


def test_a_greedy_root_lies_as_far_from_exact_as_its_token_is_unlikely(tiny_llama: Path) -> None:
    engine = build_engine(tiny_llama, trees=[TREES[16]], acceptance=Typical())
    engine.set_speculation(16)
    prompts = [[7, 8, 9], [11, 12, 13, 14]]
    distance = distance_from_exact(engine, prompts, 0.7, samples=3)
    model = load_reference(tiny_llama)

    def law(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return (model(torch.tensor([ids])).logits[0, -1] / 0.7).log_softmax(-1)

    said = engine.generate(prompts, SamplingParams(max_tokens=2, temperature=0.7, ignore_eos=True))
    pairs = [(ids, completion.token_ids) for ids, completion in zip(prompts, said, strict=True)]
    assert distance.first == pytest.approx(sum(-float(law(ids).max()) for ids, _ in pairs) / 2, rel=1e-4)
    second = sum(-float(law([*ids, first])[then]) for ids, (first, then) in pairs) / 2
    assert distance.second == pytest.approx(second, rel=1e-4)
    assert (distance.prompts, distance.samples) == (2, 3)


# The whole


def test_the_benchmark_writes_json_markdown_and_plots(
    tiny_llama: Path, heads: Path, prompt_file: Path, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(hardware, "copy_rate", lambda device: 5e9)
    config = DecodeConfig(
        prompts=prompt_file,
        model=str(tiny_llama),
        heads=heads,
        draft=str(tiny_llama),
        max_tokens=8,
        temperatures=(0.0, 0.7),
        concurrency=(1, 2),
        repeats=3,
        trees=(4,),
        num_prompts=4,
        context=40,
        device="cpu",
        out=tmp_path / "out",
    )
    page = DecodeBenchmark(config).run()
    content = json.loads((tmp_path / "out" / "decode.json").read_text())
    names = [(row["contender"], row["concurrency"]) for row in content["rows"]]
    engine = ["plain, T=0", "plain, T=0.7", "medusa, T=0", "medusa, T=0.7", "medusa, 4 nodes, T=0"]
    for name in [*engine, "medusa, typical, T=0.7", "HF generate, T=0"]:
        assert (name, 1) in names and (name, 2) in names
    assert ("HF assisted, T=0", 1) in names and len(names) == 15
    backbone, _ = load(tiny_llama)
    of_heads = hardware.heads_bytes(load_checkpoint(heads, backbone).heads, backbone)
    of_token = hardware.kv_bytes_per_token(backbone)
    for row in content["rows"]:
        assert row["tokens_per_second"]["median"] > 0 and row["step_ms"] > 0
        read = hardware.weight_bytes(backbone) + row["concurrency"] * (40 + 8 / 2) * of_token
        read += row["speculating"] * of_heads
        assert row["bandwidth_share"] == pytest.approx(read / (row["step_ms"] * 5e6))
        assert f"| {row['step_ms']:.2f} |" in page and f"| {row['bandwidth_share']:.0%} |" in page
        assert row["gpu_idle_share"] is None
        assert (row["end_to_end"] is None) == row["contender"].startswith("HF")  # its prompts are computed again
        assert (row["ratio"] is None) == row["contender"].startswith("plain")
        assert (row["steady"] is None) == row["contender"].startswith("HF")
        assert (row["steady_ratio"] is None) == row["contender"].startswith(("plain", "HF"))
    assert content["settings"]["prompt tokens, mean"] == 40.0 and content["settings"]["step times"]
    assert content["settings"]["typical acceptance, distance"]["first"] > 0
    assert page == (tmp_path / "out" / "decode.md").read_text()
    assert all(row["over_own"] is None for row in content["rows"]) and "over own" not in page  # no --grammar
    assert "medusa, typical" in page and "KL(typical || exact)" in page and "GPU idle" not in page
    assert "| steady tokens/s |" in page and "no steady" not in page
    assert "- copy rate, GB/s: 5.0" in page
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["decode.json", "decode.md", "over_plain.png", "step_ms.png", "tokens_per_second.png"]


def test_weights_of_one_byte_are_timed_for_every_contender(
    tiny_llama: Path, heads: Path, prompt_file: Path, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(hardware, "copy_rate", lambda device: 5e9)
    config = DecodeConfig(
        prompts=prompt_file,
        model=str(tiny_llama),
        heads=heads,
        max_tokens=8,
        temperatures=(0.0,),
        concurrency=(1,),
        repeats=3,
        num_prompts=2,
        context=40,
        typical=False,
        quantization="int8",
        device="cpu",
        out=tmp_path,
    )
    page = DecodeBenchmark(config).run()
    content = json.loads((tmp_path / "decode.json").read_text())
    assert {row["contender"] for row in content["rows"]} == {"plain, T=0", "medusa, T=0", "HF generate, T=0"}
    assert "- quantization: int8" in page and content["settings"]["quantization"] == "int8"
    backbone = Backbone.from_pretrained(tiny_llama, device="cpu", quantization="int8")
    assert hardware.weight_bytes(backbone) < hardware.weight_bytes(Backbone.from_pretrained(tiny_llama, device="cpu"))
    read = hardware.weight_bytes(backbone) + (40 + 8 / 2) * hardware.kv_bytes_per_token(backbone)
    plain = next(row for row in content["rows"] if row["contender"] == "plain, T=0")
    assert plain["bandwidth_share"] == pytest.approx(read / (plain["step_ms"] * 5e6))


def test_the_command_runs_the_whole_table_by_default_and_prints_it(prompt_file: Path, monkeypatch) -> None:
    asked = []

    class Printed:
        def __init__(self, config: DecodeConfig) -> None:
            asked.append(config)

        def run(self) -> str:
            return "the page"

    monkeypatch.setattr("benchmarks.decoding.DecodeBenchmark", Printed)
    done = CliRunner().invoke(app, ["bench", "decode", "--prompts", str(prompt_file)])
    assert (done.exit_code, done.output) == (0, "the page\n")
    assert asked == [DecodeConfig(prompts=prompt_file, out=Path("runs/bench/decode"))]
    assert asked[0].temperatures == (0.0, 0.7, 1.0)
    assert asked[0].concurrency == (1, 2, 4, 8, 16, 32, 64, 128)
    assert asked[0].peers and asked[0].typical and asked[0].peers_at == ()


@pytest.mark.slow
def test_a_small_model_is_measured_in_a_larger_shape(
    tiny_llama: Path, heads: Path, prompt_file: Path, tmp_path
) -> None:
    arguments = [
        "bench",
        "decode",
        "--prompts",
        prompt_file,
        "--model",
        tiny_llama,
        "--heads",
        heads,
        "--device",
        "cpu",
    ]
    arguments += ["--inflate", "tiny-test", "--max-tokens", "8", "--concurrency", "1", "--temperatures", "0"]
    arguments += ["--repeats", "3", "--num-prompts", "2", "--no-typical", "--no-peers", "--out", tmp_path / "out"]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "out" / "decode.json").read_text())["settings"]
    assert settings["model"].endswith("@tiny-test")
    assert "medusa, T=0" in done.output


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"repeats": 2}, "--repeats is at least 3"),
        ({"concurrency": ()}, "--concurrency"),
        ({"temperatures": (-1.0,)}, "--temperatures"),
        ({"dtype": "int4"}, "--dtype is one of"),
        ({"quantization": "int4"}, "--quantization is one of int8, fp8, got 'int4'"),
        ({"peers_at": (3,)}, "--peers-at"),
        ({"max_tokens": 7}, "--max-tokens"),
    ],
)
def test_bad_options_are_named(options, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        DecodeConfig(prompts=Path("p"), out=Path("o"), **options)


def test_a_draft_of_another_vocabulary_is_refused(
    tiny_llama: Path, make_backbone_dir, prompt_file, tmp_path, monkeypatch
) -> None:
    draft = make_backbone_dir("llama", seed=9, vocab_size=600)
    monkeypatch.setattr(Engine, "generate", None)  # refused before any work
    config = DecodeConfig(
        prompts=prompt_file,
        model=str(tiny_llama),
        draft=str(draft),
        max_tokens=8,
        concurrency=(1,),
        repeats=3,
        num_prompts=1,
        temperatures=(0.0,),
        device="cpu",
        out=tmp_path,
    )
    with pytest.raises(ConfigError, match="vocabulary of 600 tokens, the model 512"):
        DecodeBenchmark(config).run()


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_the_script_needs_no_cluster_nor_tracking() -> None:
    """A GPU machine without Ray, MLflow, FastAPI and openai runs it."""
    code = (
        "import sys\n"
        "for name in ('ray', 'mlflow', 'fastapi', 'openai', 'datasets'): sys.modules[name] = None\n"
        "import benchmarks.decode, benchmarks.decoding"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    script = [sys.executable, str(ROOT / "benchmarks" / "decode.py"), "--help"]
    shown = subprocess.run(script, cwd="/", check=True, timeout=120, capture_output=True, text=True)
    assert "--time-budget" in shown.stdout


def test_the_speed_while_all_decode_leaves_out_the_tails_of_waves() -> None:
    """Two requests, of which one ends after 0.2 s; and a wave in which one had ended before."""
    plain = Run(decode_seconds=0.4, decode_tokens=6, tokens=6, replies_steps=6, replies_tokens=6, nodes=[1])
    plain.full_steps, plain.full_tokens = [0.05, 0.05, 0.1], 4
    tree = Run(decode_seconds=0.4, decode_tokens=6, tokens=6, replies_steps=4, replies_tokens=6, nodes=[4])
    tree.full_steps, tree.full_tokens = [0.1], 3
    tail = Run(decode_seconds=0.4, decode_tokens=6, tokens=6, replies_steps=4, replies_tokens=6, nodes=[4])
    contenders = [EngineContender(name, "plain", 0.0, None, lambda e: None) for name in ("plain", "tree")]
    runs = {"plain": [plain, plain], "tree": [tree, tail]}
    first, second = summarise(contenders, runs, 2, plan(Estimate(1.0), 2, 4, 3, None))
    assert first.full.median == pytest.approx(20.0) and first.full_ratio is None
    assert first.step_ms == pytest.approx(50.0)  # the median
    assert second.full.median == pytest.approx(30.0)
    assert (second.ratio.median, second.full_ratio.median) == (pytest.approx(1.0), pytest.approx(1.5))
    assert "| 1.500 (1.500 to 1.500) |" in markdown({}, [first, second], [])
