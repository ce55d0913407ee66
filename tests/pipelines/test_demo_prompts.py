from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.demo_prompts import MODULES, demo_rows, stdlib_symbols
from pipelines.prompt_files import drop_duplicates, normalise, read_prompts
from pipelines.prompts import PromptsConfig, load_prompts, prepare_prompts


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return demo_rows()


def test_there_are_enough_of_every_kind(rows: list[dict]) -> None:
    assert 4000 <= len(rows) <= 6500
    kinds = Counter(row["category"] for row in rows)
    assert min(kinds[f"python {kind}"] for kind in ("module", "class", "function", "method")) > 50
    assert sum(count for kind, count in kinds.items() if not kind.startswith("python")) > 500
    assert sum(len(row["turns"]) == 2 for row in rows) > 100


def test_ids_and_questions_are_unique_and_usable(rows: list[dict]) -> None:
    prompts, duplicates = drop_duplicates(normalise(row) for row in rows)
    assert duplicates == 0 and len({p.turns for p in prompts}) == len(prompts)
    text = "\n".join(turn for prompt in prompts for turn in prompt.turns)
    assert " at 0x" not in text and "{" + "name" + "}" not in text
    assert max(len(prompt.turns[0]) for prompt in prompts) < 1000


def test_known_symbols_are_asked_about(rows: list[dict]) -> None:
    names = {symbol.name: symbol for symbol in stdlib_symbols()}
    assert {"os.path.join", "json.dumps", "pathlib.Path.exists", "re", "collections.deque"} <= set(names)
    assert names["json.dumps"].summary.startswith("Serialize")
    asked = {row["id"]: row["turns"][0] for row in rows}
    assert "os.path" in asked["python/os.path.join"]


def test_the_same_python_gives_the_same_prompts(rows: list[dict]) -> None:
    """Whatever the process has loaded: ray and others put functions of their own into standard modules."""
    import ray.data  # noqa: F401

    assert demo_rows() == rows


def test_making_them_prints_nothing_and_opens_nothing() -> None:
    script = (
        f"import importlib, sys; [importlib.import_module(m) for m in {MODULES.split()!r}]; print(len(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=120, text=True)
    assert done.stdout.strip().isdigit() and not done.stderr


def test_the_step_splits_them_into_training_and_evaluation(tmp_path: Path) -> None:
    tracker = SimpleNamespace(step=lambda _: nullcontext(SimpleNamespace(log_metrics=lambda _: None)))
    context = SimpleNamespace(root=tmp_path, tracker=tracker)
    common = {"generator": "python-docs", "heldout_fraction": 0.05}
    train = load_prompts(prepare_prompts(context, PromptsConfig(**common, part="train", limit=300)))
    heldout = load_prompts(prepare_prompts(context, PromptsConfig(**common, part="heldout")))
    assert len(train) == 300 and 150 < len(heldout) < 350
    assert not {p.turns[0] for p in train} & {p.turns[0] for p in heldout}
    assert len({p.category for p in train}) > 5


def test_no_question_stands_in_the_shared_sets(rows: list[dict], shared_data: Path) -> None:
    known = {p.turns[0].strip() for p in read_prompts(shared_data / "heldout_chat.jsonl")[0]}
    with gzip.open(shared_data / "chat_train.jsonl.gz") as file:
        known |= {json.loads(line)["messages"][0]["content"].strip() for line in file}
    assert not [row["turns"][0] for row in rows if row["turns"][0].strip() in known]
