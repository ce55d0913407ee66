"""Fixtures every test may use: one Ray cluster a session, tiny random backbones, the model of the demo.

The environment is set here, before anything imports ray, transformers or mlflow: no network, no telemetry.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
    RAY_TRAIN_METRICS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    # A proxy that starts beside other tests on few cores takes longer than the 5 s after which Serve ends it.
    RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60",
    RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S="60",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MLFLOW_DISABLE_TELEMETRY="true",
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",  # nobody asks for jobs, for which a server starts six more processes
    DO_NOT_TRACK="true",
    AWS_EC2_METADATA_DISABLED="true",
    # Threads of a process wait for each other by spinning, which beside Ray on few cores costs more than it saves.
    OMP_NUM_THREADS="1",
    # Ray's workers do not inherit sys.path: this is how they import the checkout.
    PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
)
os.environ.pop("RAY_ADDRESS", None)  # never a cluster that somebody else runs
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.medusa.interpreter import patch_language_once

    patch_language_once()

CORPUS = [
    "The quick brown fox jumps over the lazy dog. How many foxes does it take to make a pack?",
    "User: What is the capital of France?\nAssistant: The capital of France is Paris.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Water boils at 100 degrees Celsius (212 °F) at sea level, and freezes at 0 degrees.",
    "Explain step by step how a tree of guesses is checked in a single pass of the model.",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# What each family calls its sizes; everything else keeps the family's own default.
_USUAL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
)
_GPT2 = dict(n_embd=64, n_layer=2, n_head=4, n_positions=512)
_OPT = dict(
    hidden_size=64,
    ffn_dim=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    word_embed_proj_dim=64,
    max_position_embeddings=512,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _USUAL,
    "mistral": _USUAL | {"sliding_window": None},
    "qwen2": _USUAL,
    "qwen3": _USUAL,
    "gemma": _USUAL,
    "gemma2": _USUAL | {"sliding_window": 512, "final_logit_softcapping": 5.0},
    "gemma3_text": _USUAL | {"sliding_window": 512},
    "phi3": _USUAL | {"pad_token_id": 0},
    "granite": _USUAL | {"logits_scaling": 2.0},
    "cohere": _USUAL | {"logit_scale": 0.5},
    "cohere2": _USUAL | {"logit_scale": 0.5, "sliding_window": 512},
    "mixtral": _USUAL | {"num_local_experts": 4, "sliding_window": None},
    "gpt_neox": {k: v for k, v in _USUAL.items() if k not in ("num_key_value_heads", "head_dim")},
    "gpt2": _GPT2,
    "opt": _OPT,
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.processes import FilesAndRay

    return FilesAndRay(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one of several processes
        from tests.processes import place

        items.sort(key=lambda item: place(item.nodeid))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of this session's own, on 4 logical CPUs (fewer: Ray Train with datasets hangs)."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=512 * 2**20,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def chat8m() -> Path:
    """The folder of the embedded demo model."""
    return ROOT / "models" / "chat-8m"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Prompt sets beside the checkout that are not part of the project."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"the shared prompt sets are not here ({path})")
    return path


BackboneFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def make_backbone_dir(tmp_path_factory: pytest.TempPathFactory, chat8m: Path) -> BackboneFactory:
    """`make_backbone_dir(family="llama", seed=0, vocab=512, **config)`: the folder of a tiny random backbone.

    `vocab` is the size of a byte-level BPE trained on the spot, or None for chat-8m's tokenizer (8,192).
    Equal calls give the same folder for the whole session: copy it before changing anything in it.
    """
    made: dict[str, Path] = {}

    def make(family: str = "llama", seed: int = 0, vocab: int | None = 512, **config: Any) -> Path:
        key = json.dumps([family, seed, vocab, config], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{family}-{seed}-")
            _save_backbone(made[key], chat8m, family, seed, vocab, config)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_backbone_dir: BackboneFactory) -> Path:
    """The folder of a Llama of 2 layers and 512 tokens, random weights."""
    return make_backbone_dir("llama")


@pytest.fixture
def hashing_gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """Threads that hash weights wait until it is set: as for a large model."""
    from medusa import weights

    gate, hash_now = Event(), weights.weights_digest

    def hash_later(directory: Path) -> str:
        assert gate.wait(60)
        return hash_now(directory)

    monkeypatch.setattr(weights, "weights_digest", hash_later)
    yield gate
    gate.set()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """`make_tokenizer(vocab=512, chat_template=...)`: a Hugging Face byte-level BPE trained in process."""
    return train_tokenizer


def _save_backbone(
    folder: Path, chat8m: Path, family: str, seed: int, vocab: int | None, changes: dict[str, Any]
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = train_tokenizer(vocab) if vocab else AutoTokenizer.from_pretrained(chat8m)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    # A wider spread than the default 0.02 keeps a random model's best tokens clear of each other.
    settings = {"vocab_size": len(tokenizer), "initializer_range": 0.1} | ids | FAMILIES[family] | changes
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(vocab: int = 512, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """Ids 0, 1, 2 are <pad>, <s>, </s>; then the two role marks, 256 bytes and merges, `vocab` in all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=8,
    )
    backend.train_from_iterator(CORPUS, trainer)
    missing = vocab - backend.get_vocab_size()
    backend.add_tokens([f"<unused{index}>" for index in range(missing)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<pad>",  # some families' classes would add a token of their own
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer
