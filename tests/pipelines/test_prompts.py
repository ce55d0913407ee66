from __future__ import annotations

import gzip
import json
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medusa.config import ConfigError
from pipelines.prompt_files import Prompt, PromptError, RowError, drop_duplicates, normalise, read_prompts
from pipelines.prompts import (
    SCHEMA,
    PromptsConfig,
    SamplesConfig,
    load_prompts,
    part_of,
    prepare_prompts,
    select,
    write_prompts,
)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def prepare(tmp_path: Path, **config: Any):
    tracker = SimpleNamespace(step=lambda _: nullcontext(SimpleNamespace(log_metrics=lambda _: None)))
    context = SimpleNamespace(root=tmp_path / "runs", tracker=tracker)
    return prepare_prompts(context, PromptsConfig(**config))


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": "a", "messages": chat("q1", "r1", "q2", "r2")}, Prompt("a", ("q1", "q2"))),
        ({"id": 7, "prompt": "  q \n"}, Prompt("7", ("  q \n",))),
        ({"id": 81, "turns": ["q1", "q2"], "category": "math"}, Prompt("81", ("q1", "q2"), None, "math")),
        ({"id": "s", "system": "be brief", "prompt": "q"}, Prompt("s", ("q",), "be brief")),
        (
            {"id": "m", "messages": [{"role": "system", "content": "be brief"}, *chat("q")], "source": "x"},
            Prompt("m", ("q",), "be brief", "x"),
        ),
        (
            {"id": "g", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]},
            Prompt("g", ("q",)),
        ),
        (
            {"id": "p", "messages": [{"role": "user", "content": [{"type": "text", "text": "q"}] * 2}]},
            Prompt("p", ("qq",)),
        ),
        (  # UltraChat 200k repeats the first turn as "prompt"
            {"prompt": "q1", "prompt_id": "f0e3", "messages": chat("q1", "r1", "q2", "r2")},
            Prompt("f0e3", ("q1", "q2")),
        ),
        ({"id": "0", "data": ["q1", "r1", "q2", "r2"]}, Prompt("0", ("q1", "q2"))),
        (
            {"id": "w", "conversations": [{"from": r, "value": r} for r in ("system", "human", "chatgpt", "human")]},
            Prompt("w", ("human", "human"), "system"),
        ),
        (
            {"instruction": "q", "output": "r", "generator": "text_davinci_003", "dataset": "helpful_base", "id": 4},
            Prompt("4", ("q",), None, "helpful_base"),
        ),
        (
            {"id": "alpaca", "instruction": "Sum up.", "input": "Text.", "output": "r"},
            Prompt("alpaca", ("Sum up.\n\nText.",)),
        ),
        ({"id": "none", "instruction": "q", "input": "", "messages": None}, Prompt("none", ("q",))),
        (
            {"custom_id": "r-1", "url": "/v1/chat/completions", "body": {"model": "m", "messages": chat("q")}},
            Prompt("r-1", ("q",)),
        ),
        ({"question_id": 81, "turns": ["q1"]}, Prompt("81", ("q1",))),
        ({"conversation_id": "l", "conversation": chat("q", "r"), "turn": 1}, Prompt("l", ("q",))),
        ({"id": "pref", "prompt": chat("q"), "chosen": chat("q", "r")}, Prompt("pref", ("q",))),
    ],
)
def test_rows_of_every_shape_become_user_turns(row: dict[str, Any], expected: Prompt) -> None:
    assert normalise(row) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "a row is an object"),
        ({"id": "a"}, "none of messages, conversations, .*, prompt is there; the keys are \\['id'\\]"),
        ({"custom_id": "e", "body": {"input": "text"}}, "body must hold messages"),
        ({"data": "q"}, "data must be a list, got str"),
        ({"instruction": "q", "input": 3}, "content must be text, got int"),
        ({"messages": chat()}, "no user turn"),
        ({"messages": [{"role": "assistant", "content": "r"}]}, "no user turn"),
        ({"turns": ["q", "  "]}, "user turn 2 is empty"),
        ({"prompt": 5}, "content must be text, got int"),
        ({"messages": "q"}, "messages must be a list, got str"),
        ({"messages": ["q"]}, "message 1 is str"),
        ({"messages": [{"role": "tool", "content": "q"}]}, "role 'tool'"),
        ({"messages": [*chat("q"), {"role": "system", "content": "s"}]}, "role 'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content must be text, got list"),
        ({"id": 1.5, "prompt": "q"}, "id must be text or an integer, got 1.5"),
        ({"id": True, "prompt": "q"}, "id must be text or an integer, got True"),
        ({"system": 3, "prompt": "q"}, "system must be text"),
        ({"prompt": "half a pair: \ud83d"}, "surrogate"),
    ],
)
def test_a_row_that_cannot_be_used_tells_why(row: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        normalise(row)


def test_a_prompt_without_an_id_gets_one_from_its_content() -> None:
    first, same = normalise({"prompt": "q", "category": "x"}), normalise({"messages": chat("q", "any reply")})
    assert first.id == same.id == "1373a91413e9b2e15f7b"  # the same in every process and release
    assert len({first.id, normalise({"prompt": "p"}).id, normalise({"prompt": "q", "system": "s"}).id}) == 3


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": f"question {i}, naïve ☃"} for i in range(3)]
    expected = [Prompt(str(i), (f"question {i}, naïve ☃",)) for i in range(3)]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n\n", "\r\n\r\n").encode())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"):
        assert read_prompts(tmp_path / name) == (expected, []), name
    (tmp_path / "a.txt").write_text("\n".join(row["prompt"] for row in rows))
    prompts, rejected = read_prompts(tmp_path / "a.txt")
    assert [p.turns for p in prompts] == [p.turns for p in expected] and not rejected


def test_bad_rows_are_kept_aside_with_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "good"}\n\nnot json\n{"prompt": "\xff"}\n{"turns": []}\n' + b"[" * 100_000)
    prompts, rejected = read_prompts(path)
    assert [p.turns[0] for p in prompts] == ["good"]
    assert [row.line for row in rejected] == [3, 4, 5, 6]
    assert rejected[0].row == "not json" and rejected[0].reason.startswith("not JSON")
    assert "not UTF-8" in rejected[1].reason and "\\xff" in rejected[1].row
    output = prepare(tmp_path, path=str(path))
    assert output.manifest["counts"]["rejected"] == 4 and output.manifest["counts"]["input"] == 5
    kept = [json.loads(line) for line in (output.path / "rejected.jsonl").read_text().splitlines()]
    assert [row["line"] for row in kept] == [3, 4, 5, 6] and kept[2]["reason"].startswith("no user turn")


def test_datasets_of_hugging_face_are_read(tmp_path: Path) -> None:
    rows = [{"id": str(i), "messages": chat(f"q{i}", "r")} for i in range(2_500)]
    expected = [Prompt(str(i), (f"q{i}",)) for i in range(2_500)]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "saved", num_shards=3)
    assert len(list((tmp_path / "saved").glob("*.arrow"))) == 3
    assert read_prompts(tmp_path / "saved") == (expected, [])
    datasets.DatasetDict(train=dataset).save_to_disk(tmp_path / "one split")
    assert read_prompts(tmp_path / "one split") == (expected, [])
    datasets.DatasetDict(train=dataset, test=dataset.select(range(5))).save_to_disk(tmp_path / "two splits")
    assert read_prompts(tmp_path / "two splits" / "test") == (expected[:5], [])
    with pytest.raises(PromptError, match=r"holds the splits \['train', 'test'\]; give one of them"):
        read_prompts(tmp_path / "two splits")


def test_a_snapshot_of_parquet_files_is_read_by_split(tmp_path: Path) -> None:
    snapshot = tmp_path / "ultrachat"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "README.md").write_text("a card")
    for name, numbers in {
        "train_sft-00000-of-00002": [0, 1],
        "train_sft-00001-of-00002": [2],
        "test_sft-00000-of-00001": [3],
    }.items():
        rows = [{"prompt": f"q{i}", "prompt_id": f"p{i}", "messages": chat(f"q{i}", "r", "more")} for i in numbers]
        pq.write_table(pa.Table.from_pylist(rows), snapshot / "data" / f"{name}.parquet")
    with pytest.raises(
        PromptError, match=r"the splits \['test_sft', 'train_sft'\]; choose by a pattern, such as .*train_sft-\*"
    ):
        read_prompts(snapshot)
    chosen = snapshot / "data" / "train_sft-*.parquet"
    assert read_prompts(chosen)[0] == [Prompt(f"p{i}", (f"q{i}", "more")) for i in range(3)]
    output = prepare(tmp_path, path=str(chosen))
    assert output.manifest["counts"]["written"] == 3
    pq.write_table(pa.Table.from_pylist([{"prompt": "new"}]), snapshot / "data" / "train_sft-00002-of-00003.parquet")
    assert prepare(tmp_path, path=str(chosen)).key != output.key
    with pytest.raises(PromptError, match="no file has such a name"):
        read_prompts(snapshot / "data" / "valid-*.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PromptError, match=r"holds no dataset and no file ending in \.parquet"):
        read_prompts(tmp_path / "empty")


def test_a_rejected_row_of_several_files_names_its_file(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", {"prompt": f"good {name}"}, {"prompt": ""})
    prompts, rejected = read_prompts(tmp_path / "?.jsonl")
    assert [prompt.turns for prompt in prompts] == [("good a",), ("good b",)]
    assert [(row.file, row.line) for row in rejected] == [("a.jsonl", 2), ("b.jsonl", 2)]


def test_equal_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        *[{"id": 1, "prompt": "q"}] * 3,
        {"prompt": "r"},
        {"prompt": "r"},
        {"id": 2, "prompt": "q"},
    )
    output = prepare(tmp_path, path=str(path))
    assert sorted((p.id, p.turns[0]) for p in load_prompts(output))[:2] == [("1", "q"), ("2", "q")]
    counts = output.manifest["counts"]
    assert (counts["input"], counts["written"], counts["duplicates"]) == (6, 3, 3)


def test_one_id_with_two_contents_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"id": "1", "prompt": "q"}, {"id": 1, "prompt": "r"})
    with pytest.raises(PromptError, match="id '1' stands for two different prompts, 'q' and 'r'; make the ids"):
        prepare(tmp_path, path=str(path))
    with pytest.raises(PromptError):
        drop_duplicates([Prompt("1", ("q",)), Prompt("1", ("q",), "system")])


@pytest.mark.parametrize("content", ["", "\n\n \n"])
def test_an_empty_file_is_a_clear_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(PromptError, match=r"p\.jsonl is empty; it must hold at least one prompt, for example"):
        prepare(tmp_path, path=str(path))


def test_a_file_of_nothing_but_bad_rows_is_a_clear_error(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", "oops", {"a": 1})
    with pytest.raises(PromptError, match="no prompt is left to use.*line 1 was rejected: not JSON"):
        prepare(tmp_path, path=str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"a,b", "expected a file ending in"),
        ("p.jsonl.gz", b"not gzip", "cannot be read"),
        ("p.jsonl.gz", gzip.compress(b'{"prompt": "q"}\n' * 99, mtime=0)[:-9], "cannot be read"),
        ("p.parquet", b"PAR1", "cannot be read"),
        ("p.json", b'{"prompt": "q"}\n{"prompt": "q"}', "is named .jsonl"),
        ("p.json", b'{"prompt": "q"}', "must hold a JSON array"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: no such prompt file"):
        prepare(tmp_path, path=str(tmp_path / "nowhere.jsonl"))


def test_the_step_is_skipped_when_done_and_made_anew_when_the_file_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "q"})
    first, again = prepare(tmp_path, path=str(path)), prepare(tmp_path, path=str(path))
    assert (again.key, again.digest) == (first.key, first.digest)
    write(path, {"prompt": "q"}, {"prompt": "r"})
    assert prepare(tmp_path, path=str(path)).key != first.key


def test_parts_share_no_prompt_and_limits_are_prefixes() -> None:
    prompts = [Prompt(str(i), (f"q{i}",)) for i in range(400)]
    chosen = {}
    for part in ("train", "heldout", "all"):
        for seed in (0, 1):
            config = PromptsConfig(generator="python-docs", part=part, heldout_fraction=0.2, seed=seed)
            chosen[part, seed], _ = select(prompts, config)
    train, heldout = ({p.id for p in chosen[part, 0]} for part in ("train", "heldout"))
    assert not train & heldout and len(train | heldout) == 400 and 50 < len(heldout) < 110
    assert {p.id for p in chosen["heldout", 1]} == heldout and chosen["heldout", 1] != chosen["heldout", 0]
    assert {part_of(i, 0.2) for i in heldout} == {"heldout"} == {part_of(i, 0.5) for i in heldout}
    limited = PromptsConfig(generator="python-docs", part="train", heldout_fraction=0.2, limit=30)
    few, left_out = select(prompts, limited)
    assert few == chosen["train", 0][:30]
    assert left_out == {"other_part": len(heldout), "excluded": 0, "beyond_limit": len(train) - 30}


def test_prompts_of_another_file_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "q"}, {"prompt": "r"}, {"prompt": "s"})
    known = write(tmp_path / "known.jsonl", {"id": "other", "messages": chat("r ", "x", "q", "y")})
    output = prepare(tmp_path, path=str(path), exclude=str(known))
    assert {p.turns[0] for p in load_prompts(output)} == {"q", "s"}
    assert output.manifest["counts"]["excluded"] == 1


def test_a_table_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    prompts = [Prompt("a", ("q ☃\n", "r"), "s", "c"), Prompt("b", (" q\t",))]
    write_prompts(tmp_path / "prompts.parquet", prompts)
    assert load_prompts(tmp_path / "prompts.parquet") == prompts
    assert [f.name for f in tmp_path.iterdir()] == ["prompts.parquet"]
    bad = write(tmp_path / "bad.jsonl", {"prompt": "q"}, {"prompt": ""})
    with pytest.raises(PromptError, match="row 2: user turn 1 is empty"):
        load_prompts(bad)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "either path or generator"),
        ({"path": "p", "generator": "python-docs"}, "either path or generator"),
        ({"path": "p", "limit": 0}, "limit must be at least 1"),
        ({"path": "p", "heldout_fraction": 1.0}, "below 1"),
        ({"path": "p", "part": "heldout"}, "needs heldout_fraction > 0"),
    ],
)
def test_configs_that_make_no_sense_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptsConfig(**config)


def test_the_shared_sets_are_read(shared_data: Path) -> None:
    counts = {}
    for name in ("heldout_chat", "mt_bench", "gsm8k_test", "mbpp_test"):
        prompts, rejected = read_prompts(shared_data / f"{name}.jsonl")
        counts[name] = len(prompts)
        assert not rejected and len(drop_duplicates(prompts)[0]) == len(prompts)
    assert counts == {"heldout_chat": 600, "mt_bench": 80, "gsm8k_test": 1319, "mbpp_test": 500}
    mt_bench = read_prompts(shared_data / "mt_bench.jsonl")[0]
    assert mt_bench[0].id == "81" and mt_bench[0].category == "writing" and len(mt_bench[0].turns) == 2


def test_heldout_chat_loses_the_prompts_that_training_has(shared_data: Path, tmp_path: Path) -> None:
    heldout, train = shared_data / "heldout_chat.jsonl", shared_data / "chat_train.jsonl.gz"
    output = prepare(tmp_path, path=str(heldout), exclude=str(train))
    assert output.manifest["counts"]["excluded"] == 5


def sampled(folder: Path, days_ago: int, *turns: str) -> None:
    day = folder / f"day={(datetime.now(UTC).date() - timedelta(days=days_ago)).isoformat()}"
    day.mkdir(parents=True, exist_ok=True)
    rows = [{"id": Prompt("", (t,)).content_hash, "turns": [t], "system": None, "category": "sampled"} for t in turns]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), day / f"r-{len(list(day.iterdir()))}.parquet")


def test_sampled_requests_come_on_top_of_the_prompts_of_the_last_days(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", *({"prompt": f"q{n}"} for n in range(5)))
    samples = tmp_path / "samples"
    sampled(samples, 1, "new", "q1")
    sampled(samples, 2, "older", "new")
    sampled(samples, 9, "too old")
    sampled(samples, 0, "today")
    (samples / f"day={datetime.now(UTC).date() - timedelta(days=1)}" / ".x.parquet.partial").write_text("half")
    output = prepare(tmp_path, path=str(path), limit=3, samples=SamplesConfig(path=str(samples), days=7))
    prompts = load_prompts(output)
    assert [p.turns[0] for p in prompts if p.category == "sampled"] == ["new", "older"]  # q1 is known
    assert len(prompts) == 5
    counts = output.manifest["counts"]
    assert counts["sampled"] == 2
    assert counts["input"] == counts["written"] + sum(
        counts[name] for name in ("rejected", "duplicates", "other_part", "excluded", "beyond_limit")
    )
    newest = prepare(tmp_path, path=str(path), limit=3, samples=SamplesConfig(path=str(samples), limit=1))
    assert [p.turns[0] for p in load_prompts(newest) if p.category == "sampled"] == ["new"]


def test_new_samples_make_another_step_and_todays_do_not(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", {"prompt": "q"})
    samples = tmp_path / "samples"
    samples.mkdir()
    config = {"path": str(path), "samples": SamplesConfig(path=str(samples))}
    first = prepare(tmp_path, **config)
    sampled(samples, 0, "today")
    assert prepare(tmp_path, **config).key == first.key
    sampled(samples, 1, "yesterday")
    assert prepare(tmp_path, **config).key != first.key


def test_a_missing_folder_of_samples_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", {"prompt": "q"})
    with pytest.raises(PromptError, match="no such folder of sampled prompts"):
        prepare(tmp_path, path=str(path), samples=SamplesConfig(path=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="days and limit must be at least 1"):
        SamplesConfig(path="x", days=0)
