"""Tools that others evaluate and load services with: lm_eval by log-probabilities, guidellm as a load.

Each is run by its command, which `make tools` installs in an environment of its own, as their requirements are not this
project's; `make test-all` has it on the PATH.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from deployments.api import build_api
from deployments.async_engine import AsyncEngine
from medusa import Engine, SamplingParams
from tests.deployments.conftest import LiveServer
from tests.integration.services import program

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def engine(tiny_llama, tiny_heads):
    return Engine.from_pretrained(tiny_llama, tiny_heads, speculation=6, max_batch_size=4)


@pytest.fixture(scope="module")
def url(engine):
    running = AsyncEngine(engine)
    server = LiveServer(build_api(running, engine.tokenizer, "tiny"))
    yield server.url
    server.close()
    running.close()


def run(command, tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "OPENAI_API_KEY": "none", "HF_DATASETS_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_lm_eval_gets_the_models_own_logprobs(url, tiny_llama, tmp_path):
    lm_eval = program("lm_eval")
    rng = random.Random(0)
    words = "the quick brown fox jumps over a lazy dog and asks how many more it takes"
    rows = [
        {
            "question": " ".join(rng.sample(words.split(), 5)),
            "choices": [" " + " ".join(rng.sample(words.split(), 2)) for _ in range(3)],
            "label": rng.randrange(3),
        }
        for _ in range(12)
    ]
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local_choice.yaml").write_text(TASK.format(data=data))
    arguments = f"model=tiny,base_url={url}/v1/completions,tokenizer_backend=huggingface,tokenizer={tiny_llama}"
    command = [lm_eval, "--model", "local-completions", "--model_args", f"{arguments},num_concurrent=2,max_retries=1"]
    command += ["--tasks", "local_choice", "--include_path", str(tmp_path), "--batch_size", "4"]
    run([*command, "--output_path", str(out), "--log_samples"], tmp_path)
    (samples,) = out.rglob("samples_*.jsonl")
    found = {}
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        found[sample["doc_id"]] = [float(response[0]) for response in sample["filtered_resps"]]
    plain = Engine.from_pretrained(tiny_llama, max_batch_size=4)
    for i, row in enumerate(rows):
        for choice, logprob in zip(row["choices"], found[i], strict=True):
            texts = row["question"], row["question"] + choice
            # lm_eval's own default: no BOS.
            prompt, whole = (plain.tokenizer.hf.encode(text, add_special_tokens=False) for text in texts)
            params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
            (completion,) = plain.generate([whole], params)
            expected = sum(entry.logprob for entry in completion.prompt_logprobs[len(prompt) - 1 :])
            assert logprob == pytest.approx(expected, abs=1e-3)


def test_guidellm_loads_the_service_without_an_error(url, tiny_llama, tmp_path):
    program("guidellm")  # the script finds it where this does
    script = ROOT / "benchmarks" / "guidellm.sh"
    environment = os.environ | {"URL": url, "PROCESSOR": str(tiny_llama), "OUT": str(tmp_path), "RATE": "1,3"}
    environment |= {"REQUESTS": "6", "PROMPT_TOKENS": "16", "REPLY_TOKENS": "12", "HF_HOME": str(tmp_path / "hf")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "guidellm.json").read_text())
    assert len(report["benchmarks"]) == 2
    for benchmark in report["benchmarks"]:
        totals = benchmark["metrics"]["request_totals"]
        assert (totals["successful"], totals["errored"]) == (6, 0)
