from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from medusa.config import to_dict
from medusa.tree import TokenTree, expected_tokens, ladder
from pipelines.artifact import StepOutput, open_step
from pipelines.report import ReportError, write_report
from registry.gate import ConcurrencyResult, Divergence, EvaluationSet, EvaluationSummary, Measurement

ACCURACY = [
    [0.61, 0.12, 0.06, 0.035, 0.02, 0.012, 0.008, 0.006, 0.004, 0.003],
    [0.42, 0.11, 0.07, 0.04, 0.03, 0.02, 0.012, 0.01, 0.007, 0.005],
    [0.31, 0.1, 0.06, 0.045, 0.03, 0.022, 0.016, 0.012, 0.009, 0.006],
    [0.24, 0.09, 0.06, 0.04, 0.032, 0.025, 0.017, 0.013, 0.01, 0.007],
]
SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64]
TEXT = (
    "The list is sorted in place by its method sort and the function sorted returns a new list instead . Both take a "
    "key , a function of one argument that is called once for each element , and reverse , which turns the order "
    "around . \n Sorting is stable : elements that compare equal keep the order they had before"
)
WORDS = TEXT.split(" ")
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that every tag is closed where it should be, and keeps what a test asks about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"left open: {self.open}"
        self.visible = re.sub(r"\s+", " ", " ".join(self.text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def calibration(chosen: int = 16) -> dict[str, Any]:
    rows = []
    for tree in ladder(ACCURACY, SIZES):
        estimate = expected_tokens(tree, ACCURACY)
        tokens = 1 + (estimate - 1) * (1 - 0.02 * tree.num_nodes.bit_length())
        seconds = 0.0021 * (1 + 0.25 * (tree.num_nodes > 1) + 0.012 * tree.num_nodes)
        rows.append(
            {
                "nodes": tree.num_nodes,
                "tokens_per_step": tokens,
                "product_estimate": estimate,
                "product_error": estimate / tokens - 1,
                "step_seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "speedup": tokens * rows[0]["step_seconds"] / seconds if rows else 1.0,
            }
        )
    return {
        "accuracy": ACCURACY,
        "num_positions": 48213,
        "concurrency": 1,
        "ladder": rows,
        "chosen": {"1": chosen, "4": 8, "8": 1},
        "step_times": [],
        "config": {},
    }


def evaluation(**changes: Any) -> EvaluationSummary:
    loads = {
        "1": ConcurrencyResult(
            plain_tokens_per_second=471.0,
            medusa_tokens_per_second=862.4,
            speedup=1.83,
            speedup_interval=(1.79, 1.86),
            acceptance_length=2.41,
            tree_size=16,
            speculation_chosen=True,
        ),
        "8": ConcurrencyResult(
            plain_tokens_per_second=2210.0,
            medusa_tokens_per_second=2101.0,
            speedup=0.95,
            speedup_interval=(0.94, 0.97),
            acceptance_length=2.02,
            tree_size=1,
            speculation_chosen=False,
        ),
    }
    values: dict[str, Any] = dict(
        checkpoint_digest="sha256:" + "c" * 64,
        lossless=True,
        divergences=(),
        evaluation_set=EvaluationSet(digest="sha256:" + "e" * 64, num_prompts=120),
        dtype="float32",
        tree_size=16,
        speculation_chosen=True,
        acceptance_length=2.41,
        plain_tokens_per_second=471.0,
        medusa_tokens_per_second=862.4,
        speedup=1.83,
        by_concurrency=loads,
        details={
            "tokens_per_step_measured": 2.41,
            "tree_measured": 16,
            "speedup_measured": 1.83,
            "tokens_per_step_by_category": {"python <docs>": 2.63, "chat": 2.08, "rewriting": 2.51, "facts": 1.94},
            "tokens_per_step_by_size": {},
        },
    )
    return EvaluationSummary(**{**values, **changes})


def replies(with_tokens: bool = True) -> list[dict[str, Any]]:
    rng = random.Random(7)
    rows = []
    for number in range(24):
        steps = [rng.choice([1, 1, 2, 2, 3, 4, 5]) for _ in range(14 + number)]
        words = [WORDS[i % len(WORDS)] for i in range(1 + sum(steps))]
        texts = [word if word in ".,:\n" else f" {word}" for word in words]
        category = ["python <docs>", "chat", "rewriting", "facts"][number % 4]
        row = {"id": f"p{number}", "category": category, "text": "".join(texts), "accepted_per_step": steps}
        rows.append({**row, "prompt": "How do I sort <a> list?", **({"token_texts": texts} if with_tokens else {})})
    return rows


def training(records: int = 40) -> list[dict[str, Any]]:
    rows = []
    for number in range(1, records + 1):
        row: dict[str, Any] = {"step": 25 * number, "loss": 3.0, "learning_rate": 1e-3, "tokens_per_second": 4e4}
        for k, head in enumerate(ACCURACY):
            row[f"head_{k}/loss"] = 1.5 + 0.55 * k + 4 * 0.88**number
            row[f"head_{k}/top1_accuracy"] = head[0] * (1 - 0.9**number)
            row[f"head_{k}/top5_accuracy"] = 0.8 - 0.1 * k
        rows.append(row)
    return rows


def medusa_json() -> dict[str, Any]:
    heads = {"num_heads": 4, "num_layers": 1, "hidden_size": 64, "vocab_size": 512}
    return {
        "schema_version": 1,
        "heads": heads,
        "backbone": {"name": "tiny", "weights_digest": "w"},
        "trees": [tree.to_list() for tree in ladder(ACCURACY, SIZES)],
    }


VERSION = {"name": "medusa-tiny", "version": 7, "promoted": True, "gate": {"passed": True, "reasons": []}}
COUNTS = {
    "distill": {"input": 800, "written": 790, "skipped": 8, "failed": {"too_long": 2}},
    "train": {"read": 1580, "without_labels": 3},
    "calibrate": {"rows": 41, "positions": 48213},
    "evaluate": {"prompts": 120},
    "register": {"versions": 1},
}


def as_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def run_files() -> dict[str, dict[str, str]]:
    """The files that a whole run leaves, by step."""
    return {
        "distill": {},
        "train": {"metrics.jsonl": as_lines(training())},
        "calibrate": {
            "calibration.json": json.dumps(calibration()),
            "checkpoint/medusa.json": json.dumps(medusa_json()),
        },
        "evaluate": {"evaluation.json": json.dumps(to_dict(evaluation())), "replies.jsonl": as_lines(replies())},
        "register": {"version.json": json.dumps(VERSION)},
    }


def finished(root: Path, files: Mapping[str, Mapping[str, str]]) -> dict[str, StepOutput]:
    outputs = {}
    for step, contents in files.items():
        with open_step(root, step, 1, {"repeats": 3}, {}) as step_dir:
            for name, content in contents.items():
                (step_dir.path / name).parent.mkdir(parents=True, exist_ok=True)
                (step_dir.path / name).write_text(content, encoding="utf-8")
            outputs[step] = step_dir.commit({"counts": COUNTS[step]})
    return outputs


Report = Callable[..., Page]


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """`report(changes={step: {file: content}}, without=[step], ...)`: the page of a whole run, changed."""

    def make(
        changes: Mapping[str, Mapping[str, str]] | None = None, without: tuple[str, ...] = (), **arguments: Any
    ) -> Page:
        files = {step: {**kept, **(changes or {}).get(step, {})} for step, kept in run_files().items()}
        outputs = finished(tmp_path / "runs", {step: kept for step, kept in files.items() if step not in without})
        path = tmp_path / "report.html"
        write_report(path, **{"title": "Demo run", "outputs": outputs, "summary": {}, **arguments})
        return Page(path.read_text(encoding="utf-8"))

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str, Path]:
    """The page of a whole run, its source, and its folder."""
    folder = tmp_path_factory.mktemp("report")
    outputs = finished(folder / "runs", run_files())
    summary = {"device": "2 cores", "wall_seconds": 754.25, "resumed": False, "seeds": {"distill": 11}}
    write_report(folder / "out" / "report.html", title="Demo run", outputs=outputs, summary=summary)
    html = (folder / "out" / "report.html").read_text(encoding="utf-8")
    return Page(html), html, folder


def with_evaluation(**changes: Any) -> dict[str, dict[str, str]]:
    return {"evaluate": {"evaluation.json": json.dumps(to_dict(evaluation(**changes)))}}


def switched_off(measured: float, interval: tuple[float, float]) -> dict[str, dict[str, str]]:
    off = ConcurrencyResult(
        plain_tokens_per_second=471.0,
        medusa_tokens_per_second=471.0 * measured,
        speedup=measured,
        speedup_interval=interval,
        acceptance_length=1.6,
        tree_size=1,
        speculation_chosen=False,
    )
    details = {"tokens_per_step_measured": 1.6, "tree_measured": 8, "speedup_measured": measured}
    changes = dict(speculation_chosen=False, speedup=1.0, acceptance_length=1.0, tree_size=1, details=details)
    return with_evaluation(**changes, by_concurrency={"1": off})


def test_the_headline_has_every_number_and_the_verdict(whole):
    text = whole[0].visible
    assert "Speculation pays here: with one sequence at a time, a tree of 16 nodes makes 1.83 times as many" in text
    for shown in ("2.41", "471", "862", "1.83×", "1.79 to 1.86 over 3 paired runs", "16 nodes", "float32"):
        assert shown in text, shown
    assert "Lossless yes all 120 replies equal plain decoding's, token for token" in text
    assert "Model version 7 of medusa-tiny; passed the gate, now champion" in text


def test_every_section_has_its_figures_and_tables(whole):
    page = whole[0]
    for heading in (
        "Speed and exactness",
        "Loss by head",
        "Top-1 accuracy by head",
        "Accuracy by head and rank, in percent",
        "Tokens a step by tree size",
        "Expected speed and step time by tree size",
        "The chosen tree: 16 nodes",
        "Tokens a step by category",
        "A reply, step by step",
        "How it was made",
    ):
        assert heading in page.visible, heading
    assert page.tags.count("svg") == 7
    assert "Left out" not in page.visible


def test_figures_hold_their_numbers_as_text(whole):
    text = whole[0].visible
    ladder_rows = {row["nodes"]: row for row in calibration()["ladder"]}
    assert f"chosen: 16 nodes, {ladder_rows[16]['tokens_per_step']:.2f}" in text
    assert f"chosen: 16 nodes, {ladder_rows[16]['tokens_per_second']:,.0f} tokens/s" in text
    assert f"walked: {ladder_rows[64]['tokens_per_step']:.2f}" in text
    assert f"product: {ladder_rows[64]['product_estimate']:.2f}" in text
    assert f"{ladder_rows[64]['product_error']:+.1%}" in text
    assert f"plain: {ladder_rows[1]['tokens_per_second']:,.0f}" in text
    assert f"head 0: {training()[-1]['head_0/loss']:.2f}" in text
    assert f"head 3: {training()[-1]['head_3/top1_accuracy']:.0%}" in text
    assert "2.63 (6 replies)" in text
    assert " 61 12 6.0 3.5 " in text, "the first row of the accuracy map"


def test_it_loads_nothing_and_runs_nothing(whole):
    page, html, _ = whole
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", html)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert page.links, "the figures use their own symbols"
    assert all(link.startswith("#") for link in page.links)


def test_ids_are_unique_and_every_reference_has_its_target(whole):
    page, html, _ = whole
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} | set(re.findall(r"url\(#([^)]+)\)", html)) == set(page.ids)


def test_figures_take_their_colours_from_the_page(whole):
    html = whole[1]
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert not any(re.search(r"#[0-9a-f]{6}\b", drawing) for drawing in drawings), "every colour is a role"
    used = set(re.findall(r"var\(--([\w-]+)\)", html))
    assert all(html.count(f"--{role}:") == 2 for role in used), "once for light, once for dark"


def test_steps_and_further_facts_are_listed(whole):
    text, folder = whole[0].visible, whole[2]
    for path in (folder / "runs").glob("*/*"):
        assert path.name in text, "a step's key is its folder's name"
    assert "failed: too long 2, input 800, skipped 8, written 790" in text
    assert "positions 48,213" in text
    for fact in ("device 2 cores", "wall seconds 754.2", "resumed no", "seeds: distill 11"):
        assert fact in text, fact


def test_lists_and_nothing_are_facts_too(report: Report):
    text = report(
        summary={"speedup_interval": [0.9, 1.25], "head_accuracy": [[0.5, 0.1], [0.25]], "mlflow": None}
    ).visible
    assert "speedup interval 0.9, 1.25 head accuracy 0.5, 0.1; 0.25 mlflow none" in text


def test_the_same_input_gives_the_same_page(whole, tmp_path: Path):
    outputs = finished(tmp_path, run_files())
    summary = {"device": "2 cores", "wall_seconds": 754.25, "resumed": False, "seeds": {"distill": 11}}
    write_report(tmp_path / "report.html", title="Demo run", outputs=outputs, summary=summary)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == whole[1]


def test_confirmed_guesses_are_marked_in_the_sample(report: Report):
    row = {"id": "a", "text": "A b c d\n e.", "accepted_per_step": [1, 3, 2], "category": "x", "prompt": "Say <it>"}
    row["token_texts"] = ["A", " b", " c", " d", "\n", " e", "."]
    page = report({"evaluate": {"replies.jsonl": as_lines([row])}})
    html = "".join(page.text)
    assert "6 tokens in 3 steps, 2.00 a step" in page.visible
    assert "Say <it>" in page.visible
    assert page.tags.count("mark") == 2
    assert "A b c d↵\n e." not in html, "plain tokens carry no sign"
    assert "A b c d\n e." in html


def test_a_confirmed_line_break_is_visible(report: Report):
    row = {"id": "a", "text": "A\nb", "accepted_per_step": [2], "token_texts": ["A", "\n", "b"]}
    assert "A↵\nb" in "".join(report({"evaluate": {"replies.jsonl": as_lines([row])}}).text)


def test_replies_without_token_texts_are_shown_by_step(report: Report):
    row = {"id": "a", "text": "some text", "accepted_per_step": [1, 4, 2]}
    page = report({"evaluate": {"replies.jsonl": as_lines([row])}})
    assert "some text" in page.visible
    assert "The tokens that each decode step added, in order" in page.visible
    assert page.tags.count("mark") == 2


def test_everything_from_outside_is_escaped(report: Report):
    evil = '<script>alert("x")</script>&amp;'
    row = {"id": evil, "text": evil, "accepted_per_step": [1], "category": evil, "prompt": evil}
    row["token_texts"] = [evil, evil]
    details = {**evaluation().details, "tokens_per_step_by_category": {evil: 2.0, "$x^2$ </text>": 1.5}}
    changes = with_evaluation(dtype=evil, details=details)
    changes["evaluate"]["replies.jsonl"] = as_lines([row])
    changes["register"] = {"version.json": json.dumps({**VERSION, "name": evil})}
    page = report(changes, title=evil, summary={evil: evil})
    assert "script" not in page.tags
    assert page.visible.count(evil) >= 6
    assert "$x^2$ </text>" in page.visible, "and no mathematics is read into it"


@pytest.mark.parametrize(
    ("step", "sentences"),
    [
        ("train", ["the train step left no metrics.jsonl"]),
        ("calibrate", ["Left out: there is no calibration."]),
        ("evaluate", ["was not evaluated", "Left out: there is no evaluation.", "no reply with a decode step"]),
        ("register", ["nothing was registered"]),
    ],
)
def test_a_missing_step_is_left_out_with_a_sentence(report: Report, step: str, sentences: list[str]):
    page = report(without=(step,))
    for sentence in sentences:
        assert sentence in page.visible, sentence


def test_a_run_without_any_step_still_makes_a_page(tmp_path: Path):
    write_report(tmp_path / "report.html", title="Empty", outputs={}, summary={})
    assert "svg" not in Page((tmp_path / "report.html").read_text()).tags


def test_speculation_that_does_not_pay_is_said_plainly(report: Report):
    page = report(switched_off(0.87, (0.85, 0.9)) | {"calibrate": {"calibration.json": json.dumps(calibration(1))}})
    assert "Speculation does not pay here, so it is switched off" in page.visible
    assert "a tree of 8 nodes ran at 0.87 times the speed of plain decoding (0.85 to 0.90" in page.visible
    assert "Tree chosen 1 node plain decoding; measured with 8 nodes" in page.visible
    assert "The tree that was measured, though speculation is off: 8 nodes" in page.visible


@pytest.mark.parametrize(
    ("interval", "sentence"),
    [((0.97, 1.04), "is not settled"), ((0.9, 0.98), "does not pay here, though"), ((1.01, 1.2), "pays here: with")],
)
def test_the_verdict_follows_the_interval(report: Report, interval: tuple[float, float], sentence: str):
    loads = {"1": ConcurrencyResult(**{**vars(evaluation().by_concurrency["1"]), "speedup_interval": interval})}
    assert sentence in report(with_evaluation(by_concurrency=loads)).visible


def test_a_single_run_claims_no_range(report: Report):
    loads = {"1": ConcurrencyResult(**{**vars(evaluation().by_concurrency["1"]), "speedup_interval": (1.83, 1.83)})}
    text = report(with_evaluation(by_concurrency=loads)).visible
    assert "1.83 times as many tokens a second as plain decoding (in a single run)" in text
    assert "1.83 to 1.83" not in text


def test_differences_from_plain_decoding_are_told(report: Report):
    ties = (Divergence(id="q1", position=4, logit_gap=0.03), Divergence(id="q2", position=9, logit_gap=0.11))
    text = report(with_evaluation(dtype="bfloat16", divergences=ties)).visible
    assert "yes, up to ties 2 of 120 replies part" in text
    assert "at most 0.11 apart (reply q2, token 9)" in text


def test_a_lossy_version_is_called_so(report: Report):
    wrong = (Divergence(id="q1", position=4, logit_gap=3.5),)
    text = report(with_evaluation(lossless=False, divergences=wrong)).visible
    assert "Lossless no 1 of 120 replies differ" in text


def test_the_champion_measured_beside_it_is_named(report: Report):
    own = {name: value for name, value in vars(evaluation(speedup=1.7, details={})).items() if name != "champion"}
    text = report(with_evaluation(champion=Measurement(**own))).visible
    assert "The champion so far, measured in the same run: 2.41 tokens a step and a speedup of 1.70" in text


def test_a_refused_version_shows_the_reasons(report: Report):
    refused = {**VERSION, "promoted": False, "gate": {"passed": False, "reasons": ["speedup 0.9 is too low"]}}
    text = report({"register": {"version.json": json.dumps(refused)}}).visible
    assert "refused by the gate: speedup 0.9 is too low" in text


def test_a_resumed_training_is_drawn_once(report: Report):
    rows = [*training(3), {"note": "a line about something else"}, {**training(2)[-1], "head_0/loss": 9.5}]
    page = report({"train": {"metrics.jsonl": as_lines(rows)}})
    assert "Loss by head" in page.visible


@pytest.mark.parametrize("records", [1, 2])
def test_a_short_training_is_drawn(report: Report, records: int):
    assert "head 3" in report({"train": {"metrics.jsonl": as_lines(training(records))}}).visible


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_a_gap(report: Report, loss: float):
    rows = training(4)
    rows[1]["head_0/loss"] = rows[3]["head_2/loss"] = loss
    assert "head 3" in report({"train": {"metrics.jsonl": as_lines(rows)}}).visible


def test_a_calibration_of_one_tree_is_drawn(report: Report):
    plain = calibration(1)
    plain |= {"ladder": plain["ladder"][:1], "accuracy": [[0.0] * 3] * 2, "chosen": {"1": 1}}
    page = report({"calibrate": {"calibration.json": json.dumps(plain)}}, without=("evaluate",))
    assert "a tree of one node is plain decoding" in page.visible


@pytest.mark.parametrize("nodes", [2, 256])
def test_trees_of_any_size_are_drawn(report: Report, nodes: int):
    changed = calibration(nodes)
    changed["ladder"][-1]["nodes"] = nodes
    tree = {**medusa_json(), "trees": [tree.to_list() for tree in ladder(ACCURACY, [nodes])]}
    files = {"calibration.json": json.dumps(changed), "checkpoint/medusa.json": json.dumps(tree)}
    page = report({"calibrate": files})
    assert f"The chosen tree: {nodes} nodes" in page.visible
    assert "No picture" not in page.visible


@pytest.mark.parametrize(
    ("step", "name", "content", "what"),
    [
        ("train", "metrics.jsonl", '{"step": 1\n', "metrics.jsonl:1"),
        ("calibrate", "calibration.json", "{}", "accuracy"),
        ("calibrate", "calibration.json", "[]", "a JSON object is needed, got list"),
        ("calibrate", "calibration.json", json.dumps({**calibration(), "chosen": {"2": 4}}), "chosen"),
        ("calibrate", "checkpoint/medusa.json", "{", "not JSON"),
        ("calibrate", "checkpoint/medusa.json", json.dumps({**medusa_json(), "trees": [[[0, 1]]]}), "parent"),
        ("evaluate", "evaluation.json", '{"lossless": true}', "speedup"),
        ("evaluate", "replies.jsonl", '{"id": "a", "text": "b"}', "accepted_per_step"),
        ("evaluate", "replies.jsonl", "no JSON", "replies.jsonl:1"),
        ("register", "version.json", '{"name": "x"}', "version"),
    ],
)
def test_a_damaged_file_is_named_with_the_remedy(report: Report, step: str, name: str, content: str, what: str):
    with pytest.raises(ReportError, match=re.escape(what)) as raised:
        report({step: {name: content}})
    assert name in str(raised.value)
    assert "remove the step's folder and run it again" in str(raised.value)


def test_damaged_details_of_an_evaluation_are_named(report: Report):
    with pytest.raises(ReportError, match="tree_measured"):
        report(with_evaluation(details={"tree_measured": "many"}))


def test_the_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "report.html"
    write_report(path, title="First", outputs={}, summary={})
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_report(path, title="Second", outputs={}, summary={})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"], "nothing half-written stays"


def test_the_tree_picture_has_a_node_for_each_of_the_tree(whole):
    drawing = next(found for found in re.findall(r"<svg.*?</svg>", whole[1], re.DOTALL) if "token tree of 16" in found)
    tree = next(tree for tree in ladder(ACCURACY, SIZES) if tree.num_nodes == 16)
    assert isinstance(tree, TokenTree)
    assert drawing.count("%</text>") == tree.num_nodes - 1
    assert all(f"head {k}</text>" in drawing for k in range(tree.max_depth))
