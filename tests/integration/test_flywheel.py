"""The data flywheel: traffic of another kind, sampled by the service, distilled by the next run, and guessed better."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from deployments.config import ServerConfig
from deployments.loading import load_service
from deployments.sampling_log import SamplingConfig
from medusa.config import validate
from pipelines.artifact import StepOutput
from pipelines.evaluate import load_evaluation
from pipelines.run import PipelineConfig, run_pipeline

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("ray_cluster")]


def known(number: int) -> str:
    return f"Question {number}: how many foxes make a pack of {number % 7 + 2} foxes?"


def shifted(number: int) -> str:
    return f"def fibonacci_{number}(n):\n    return n if n < {number % 5 + 2} else"


def prompts(path: Path, make: Any, numbers: range) -> str:
    path.write_text("".join(json.dumps({"prompt": make(number)}) + "\n" for number in numbers))
    return str(path)


def pipeline(folder: Path, backbone: Path, **prompts_config: Any) -> PipelineConfig:
    return validate(
        PipelineConfig,
        {
            "name": "flywheel",
            "root": str(folder / "runs"),
            "model": {"backbone": str(backbone), "dtype": "float32"},
            "prompts": {"path": prompts(folder / "train.jsonl", known, range(60))} | prompts_config,
            "distill": {"max_tokens": 32, "max_batch_size": 16, "rows_per_block": 16, "temperature": 0.0},
            "train": {
                "heads": {"num_heads": 2},
                "trainer": {"epochs": 10, "batch_size": 8, "lr": 5e-3, "log_every": 10},
                "num_workers": 0,
                "validation_fraction": 0.1,
            },
            "calibrate": {"sizes": [8], "width": 4, "batch_sizes": [1], "repeats": 1},
            "evaluate": {
                "prompts": {"path": prompts(folder / "heldout.jsonl", shifted, range(1000, 1024))},
                "max_tokens": 32,
                "concurrency": [1],
                "repeats": 1,
            },
            "tracking": {"uri": None},
        },
        source="flywheel",
    )


def tokens_per_step(outputs: dict[Any, StepOutput]) -> float:
    return float(load_evaluation(outputs["evaluate"])["details"]["tokens_per_step_measured"])


async def send_traffic(backbone: Path, samples: Path) -> None:
    """Sixty chats of the other kind through the service's API, every one of them sampled."""
    config = ServerConfig(
        model=str(backbone),
        model_name="tiny",
        max_batch_size=8,
        sampling=SamplingConfig(consent=True, path=str(samples), fraction=1.0),
    )
    service = load_service(config)
    try:
        transport = httpx.ASGITransport(service.api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            for number in range(60):
                messages = [{"role": "user", "content": shifted(number)}]
                body = {"model": "tiny", "messages": messages, "max_tokens": 4}
                assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    finally:
        service.close()


def move_to_yesterday(samples: Path) -> None:
    (today,) = samples.iterdir()
    today.rename(samples / f"day={(datetime.now(UTC).date() - timedelta(days=1)).isoformat()}")


async def test_acceptance_rises_on_what_users_ask_after_one_cycle(tmp_path: Path, chat8m: Path):
    before = tokens_per_step(run_pipeline(pipeline(tmp_path, chat8m), last="evaluate"))
    samples = tmp_path / "samples"
    await send_traffic(chat8m, samples)
    move_to_yesterday(samples)
    (file,) = samples.rglob("*.parquet")
    assert pq.read_metadata(file).num_rows == 60
    config = pipeline(tmp_path, chat8m, samples={"path": str(samples), "days": 3})
    outputs = run_pipeline(config, last="evaluate")
    assert outputs["prompts"].manifest["counts"]["sampled"] == 60
    after = tokens_per_step(outputs)
    assert after > before + 0.1
    # A second look on the same day finds everything done.
    again = run_pipeline(config, last="evaluate")
    assert {step: output.key for step, output in again.items()} == {
        step: output.key for step, output in outputs.items()
    }
