"""Sampled prompts: with consent only, prompts only, redacted, within limits, and readable by the pipeline."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.requests import Request

from deployments import sampling_log
from deployments.redaction import mask
from deployments.sampling_log import SampleRequests, SamplingConfig, SamplingLog, to_row
from medusa.config import ConfigError, validate

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


def body(*contents: str, **more: Any) -> bytes:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(contents)]
    return json.dumps({"messages": messages} | more).encode()


def config(folder: Path, **more: Any) -> SamplingConfig:
    return SamplingConfig(**({"consent": True, "path": str(folder), "fraction": 1.0} | more))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("day=*/*.parquet")) for row in pq.read_table(file).to_pylist()]


def drop_all(text: str) -> None:
    return None


def fail(text: str) -> str:
    raise RuntimeError("out of order")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "it needs `consent: true`"),
        ({"consent": False}, "it needs `consent: true`"),
        ({"consent": True, "fraction": 0.0}, "fraction must be above 0 and at most 1, got 0.0"),
        ({"consent": True, "max_age_days": 0}, "max_age_days must be above 0"),
        ({"consent": True, "redact": "no.such:hook"}, "'no.such:hook' is no function"),
        ({"consent": True, "redact": "deployments.redaction:_FORMS"}, "is no function"),
        ({"consent": True, "keep_replies": True}, "keep_replies"),
    ],
)
def test_nothing_is_kept_without_consent_and_a_sound_configuration(settings: dict[str, Any], words: str):
    with pytest.raises(ConfigError) as refusal:
        validate(SamplingConfig, {"path": "/x"} | settings, source="sampling")
    assert words in str(refusal.value)


def test_prompts_are_kept_and_replies_are_not(tmp_path: Path):
    log = SamplingLog(config(tmp_path), "replica/1", now=lambda: NOON)
    log.offer(body("first question", "a reply", "second question", user="somebody", temperature=0.2))
    log.close()
    (row,) = rows(tmp_path)
    assert row["turns"] == ["first question", "second question"]
    assert set(row) == {"id", "turns", "system", "category"}
    (file,) = tmp_path.rglob("*.parquet")
    assert file.parent.name == "day=2026-11-24"
    assert b"a reply" not in file.read_bytes() and b"somebody" not in file.read_bytes()


def test_the_pipeline_reads_what_was_written_and_leaves_today_out(tmp_path: Path):
    from pipelines.prompt_files import Prompt, read_prompts, sample_files

    for day, text in ((NOON - timedelta(days=9), "old"), (NOON - timedelta(days=1), "fresh"), (NOON, "today")):
        log = SamplingLog(config(tmp_path), "r", now=lambda day=day: day)
        log.offer(body(text))
        log.close()
    found = sample_files(tmp_path, 7, NOON.date())
    ((prompt,),) = [read_prompts(file)[0] for file in found]
    assert prompt.turns == ("fresh",) and prompt.id == Prompt("", ("fresh",)).content_hash


@pytest.mark.parametrize(
    ("text", "hidden", "shown"),
    [
        ("write to jane.doe+x@mail.example.org please", "jane", "write to [email] please"),
        ("my key is sk-medusa-abcdefghijklmnop0123", "abcdefgh", "my key is [key]"),
        ("call +49 (170) 123-45-678 now", "170", "call [number] now"),
        ("card 4111 1111 1111 1111.", "4111", "card [number]."),
        ("IBAN DE89 3704 0044 0532 0130 00 it is", "3704", "IBAN [iban] it is"),
        ("from 192.168.10.7 to me", "192", "from [address] to me"),
        ("in 1999 there were 12 of 345 and 3.14159", None, "in 1999 there were 12 of 345 and 3.14159"),
        ("x = [1, 2, 3]; y = 1000000", None, "x = [1, 2, 3]; y = 1000000"),
    ],
)
def test_the_default_hook_masks_forms_and_leaves_the_rest(text: str, hidden: str | None, shown: str):
    assert mask(text) == shown
    assert hidden is None or hidden not in mask(text)


def test_a_hook_of_ones_own_may_drop_and_one_that_fails_keeps_nothing(tmp_path: Path):
    assert to_row(body("q"), 100, drop_all) == (None, "redacted")
    assert to_row(body("q"), 100, fail) == (None, "redaction failed")
    module = Path(sampling_log.__file__).stem
    assert module == "sampling_log"
    settings = config(tmp_path, redact=None)
    log = SamplingLog(settings, "r", now=lambda: NOON)
    log.offer(body("mail a@b.org"))
    log.close()
    assert rows(tmp_path)[0]["turns"] == ["mail a@b.org"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (body("q", store=False), "store is false"),
        (body("q" * 101), "too long"),
        (body(""), "no text"),
        (b"{", "not readable"),
        (b"[]", "not readable"),
        (b'{"messages": [{"content": "q"}]}', "not readable"),
        (json.dumps({"messages": [{"role": "system", "content": "s"}]}).encode(), "no text"),
        (json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}).encode(), "no text"),
    ],
)
def test_what_must_not_or_cannot_be_kept_is_not(content: bytes, why: str):
    assert to_row(content, 100, mask) == (None, why)


def test_system_messages_and_text_parts_are_kept_in_the_pipelines_shape():
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    row, _ = to_row(json.dumps({"messages": messages}).encode(), 100, mask)
    assert row is not None and (row["system"], row["turns"], row["category"]) == ("be brief", ["ab"], "sampled")


def test_the_same_prompt_is_kept_once_and_files_are_whole(tmp_path: Path):
    log = SamplingLog(config(tmp_path, rows_per_file=2), "r", now=lambda: NOON)
    for text in ("a", "a", "b", "c"):
        log.offer(body(text))
    log.close()
    assert [len(pq.read_table(file)) for file in sorted(tmp_path.rglob("*.parquet"))] == [2, 1]
    assert log.counts == {"kept": 3, "dropped: the same again": 1}
    assert not list(tmp_path.rglob("*.partial"))


def test_days_beyond_the_age_limit_are_removed_and_strangers_are_left_alone(tmp_path: Path):
    for name in ("day=2026-10-01", "day=2026-11-20", "day=soon", "other"):
        (tmp_path / name).mkdir()
    log = SamplingLog(config(tmp_path, max_age_days=30), "r", now=lambda: NOON)
    log.offer(body("q"))
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "day=2026-11-20",
        "day=2026-11-24",
        "day=soon",
        "other",
    ]


def test_a_day_has_a_limit_for_all_replicas(tmp_path: Path):
    for replica in ("one", "two"):
        log = SamplingLog(config(tmp_path, max_mb_a_day=0.0001), replica, now=lambda: NOON)
        log.offer(body(replica))
        log.close()
    assert [row["turns"] for row in rows(tmp_path)] == [["one"]]
    assert log.counts == {"dropped: the day's limit": 1}


def test_storage_that_fails_costs_samples_and_nothing_else(tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    log = SamplingLog(config(tmp_path / "file"), "r", now=lambda: NOON)
    log.offer(body("q"))
    log.close()
    assert log.counts == {"dropped: storage": 1}


def test_a_writer_that_is_behind_costs_samples_and_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampling_log, "QUEUE", 1)
    monkeypatch.setattr(SamplingLog, "_run", lambda self: None)
    log = SamplingLog(config(tmp_path), "r")
    log.offer(body("a"))
    log.offer(body("b"))
    assert log.counts == {"dropped: writer behind": 1}


def test_about_the_fraction_that_was_asked_for_is_kept(tmp_path: Path):
    log = SamplingLog(config(tmp_path, fraction=0.1), "r", seed=1)
    assert 70 < sum(log.wants_one() for _ in range(1000)) < 130
    log.close()


async def test_only_chats_that_were_answered_are_offered(tmp_path: Path):
    api = FastAPI()

    @api.post("/v1/chat/completions")
    async def chat(request: Request) -> JSONResponse:
        asked = await request.json()
        return JSONResponse({}, 400 if asked["messages"][0]["content"] == "bad" else 200)

    @api.post("/v1/completions")
    async def complete(request: Request) -> JSONResponse:
        return JSONResponse(await request.json())

    log = SamplingLog(config(tmp_path), "r", now=lambda: NOON)
    api.add_middleware(SampleRequests, log=log)
    transport = httpx.ASGITransport(api)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path, text in (("chat/completions", "good"), ("chat/completions", "bad"), ("completions", "plain")):
            await client.post(f"/v1/{path}", content=body(text))
    log.close()
    assert [row["turns"] for row in rows(tmp_path)] == [["good"]]
