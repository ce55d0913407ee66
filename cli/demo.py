"""`medusa demo`: the whole path on the small model of this repository, from prompts to answered requests."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cli.cluster import ray_cluster
from cli.pipeline import Overrides
from medusa.config import ConfigError
from pipelines.artifact import StepOutput
from pipelines.calibrate import CHECKPOINT, load_calibration
from pipelines.evaluate import load_evaluation
from pipelines.run import PipelineConfig, load_pipeline, run_pipeline

CONFIG = Path("pipelines/configs/demo.yaml")
CHAT_QUESTION = "What does `calendar.Calendar.itermonthdays3` do?"
COMPLETION_PROMPT = "def fibonacci(n):\n"


def demo(
    config: Annotated[Path, typer.Option(help="The pipeline's YAML file.")] = CONFIG,
    overrides: Overrides = None,
) -> None:
    """Distils, trains, calibrates, evaluates, registers, serves and asks, in minutes on two CPU cores.

    Writes summary.json and report.html below the pipeline's root. Example: `medusa demo prompts.limit=500`
    """
    from pipelines.report import write_report

    if not config.is_file():
        raise ConfigError(f"no {config} here; run the demo from the root of the repository, or give --config")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("ray").setLevel(logging.ERROR)
    console, started = Console(), time.monotonic()
    pipeline = load_pipeline(config, overrides or [])
    with ray_cluster():
        outputs = run_pipeline(pipeline, console=console)
        console.print("serving the champion with Ray Serve ...")
        reply, completion = _ask_service(pipeline, outputs)
    summary = _summary(outputs, reply, completion, time.monotonic() - started)
    root = Path(pipeline.root)
    (root / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_report(root / "report.html", title=f"Medusa on {pipeline.model.backbone}", outputs=outputs, summary=summary)
    _print(console, summary, root)


def _ask_service(pipeline: PipelineConfig, outputs: Mapping[str, StepOutput]) -> tuple[str, str]:
    """Serves what was registered, sends one streamed chat request and one plain completion, and stops the service."""
    from openai import OpenAI

    from deployments.config import ServerConfig
    from deployments.local import local_service

    version = json.loads((outputs["register"].path / "version.json").read_text())
    evaluation = load_evaluation(outputs["evaluate"])
    config = ServerConfig(
        model=pipeline.model.backbone,
        heads=str(outputs["calibrate"].path / CHECKPOINT),
        heads_version=str(version["version"]),
        heads_digest=version["digest"],
        speculation=evaluation["tree_size"] if evaluation["speculation_chosen"] else "off",
        max_batch_size=4,
        num_cpus=2,  # as many threads as calibration and evaluation ran with
        port=_free_port(),
    )
    with local_service(config) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        stream = client.chat.completions.create(
            model=config.served_name,
            messages=[{"role": "user", "content": CHAT_QUESTION}],
            max_tokens=96,
            temperature=0,
            stream=True,
        )
        reply = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        completion = client.completions.create(
            model=config.served_name, prompt=COMPLETION_PROMPT, max_tokens=32, temperature=0
        )
        return reply, completion.choices[0].text


def _summary(outputs: Mapping[str, StepOutput], reply: str, completion: str, seconds: float) -> dict[str, Any]:
    """What the run measured. With speculation off the served speed is the plain one; the figures of the best tree
    are then in `mean_acceptance_length` and `speedup_measured` all the same."""
    evaluation, calibration = load_evaluation(outputs["evaluate"]), load_calibration(outputs["calibrate"])
    version = json.loads((outputs["register"].path / "version.json").read_text())
    details = evaluation["details"]
    return {
        "mean_acceptance_length": details["tokens_per_step_measured"],
        "plain_tokens_per_second": evaluation["plain_tokens_per_second"],
        "medusa_tokens_per_second": evaluation["medusa_tokens_per_second"],
        "speedup": evaluation["speedup"],
        "speedup_measured": details["speedup_measured"],
        "speedup_interval": evaluation["by_concurrency"][str(evaluation["concurrency"])]["speedup_interval"],
        "lossless": evaluation["lossless"],
        "divergences": len(evaluation["divergences"]),
        "head_accuracy": calibration["accuracy"],
        "tree_size": evaluation["tree_size"],
        "tree_measured": details["tree_measured"],
        "speculation_chosen": evaluation["speculation_chosen"],
        "dtype": evaluation["dtype"],
        "concurrency": evaluation["concurrency"],
        "tokens_per_step_by_size": details["tokens_per_step_by_size"],
        "model_name": version["name"],
        "model_version": version["version"],
        "reply": reply,
        "completion": completion,
        "seconds": round(seconds, 1),
    }


def _print(console: Console, summary: Mapping[str, Any], root: Path) -> None:
    table = Table(title="Medusa on Ray: the demo", show_header=False)
    table.add_row("tokens a step", f"{summary['mean_acceptance_length']:.2f} with {summary['tree_measured']} nodes")
    table.add_row("plain decoding", f"{summary['plain_tokens_per_second']:.0f} tokens/s")
    table.add_row("with Medusa", f"{summary['medusa_tokens_per_second']:.0f} tokens/s")
    low, high = summary["speedup_interval"]
    table.add_row("speedup", f"{summary['speedup_measured']:.2f} ({low:.2f} to {high:.2f}), {summary['dtype']}")
    lossless = "yes, every token equals plain decoding's" if summary["lossless"] else "NO"
    table.add_row("lossless", lossless)
    table.add_row("accuracy of each head", ", ".join(f"{head[0]:.0%}" for head in summary["head_accuracy"]))
    table.add_row("registered", f"{summary['model_name']} version {summary['model_version']}")
    table.add_row("asked", CHAT_QUESTION)
    table.add_row("answered", summary["reply"].strip())
    table.add_row("took", f"{summary['seconds']:.0f} s")
    console.print(table)
    if not summary["speculation_chosen"]:
        console.print(
            "Speculation does not pay on this machine: a tree step costs more here than its extra tokens are worth, "
            "so the service decodes plainly. Tokens a step and speedup above are those of the best tree all the same."
        )
    console.print(f"report: {root / 'report.html'}   figures: {root / 'summary.json'}", highlight=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
