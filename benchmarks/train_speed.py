"""Training speed and memory on a large shape with random weights: ours beside the straightforward implementation.

    python -m benchmarks.train_speed --shape vicuna-7b --cases m1,m1-plain,m2,m2-plain --out speed.json

The straightforward twin pads rows instead of packing them and makes the logits of all heads at once, at every position,
with torch's cross-entropy and KL over them; backbone, heads, optimiser, activation checkpointing and rows are the same.
A case that does not fit the memory is reported as such, and so is one whose package is missing: `m1-8bit` and `m1-4bit`
freeze a quantised backbone (bitsandbytes). Results of other cases that the file holds already are kept if they
were measured with the same settings on the same device, so cases can be measured one call at a time.
Tokens are real ones, prompts and replies, without padding. FLOPs count 2 a weight and token for a forward and 4 for its
backward (2 where only activations need gradients), without what checkpointing computes again.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from medusa.heads import HeadsConfig, MedusaHeads
from medusa.model import Backbone
from medusa.training.batch import IGNORE, Row
from medusa.training.loss import head_weights
from medusa.training.schedule import HeadsLossConfig, JointConfig, TrainerConfig
from medusa.training.trainer import Trainer

SHAPES = {
    "vicuna-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "llama3-8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512),
}
WARMUP = 2  # steps
CASES = ("m1", "m1-plain", "m1-shared", "m1-8bit", "m1-4bit", "m2", "m2-plain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="vicuna-7b")
    parser.add_argument("--cases", default="m1,m1-plain,m2,m2-plain", help=f"of {', '.join(CASES)}")
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--length", type=int, default=2048, help="longest row")
    parser.add_argument("--rows", type=int, default=8, help="rows a forward")
    parser.add_argument("--chunk", type=int, default=4096, help="rows of logits at once")
    parser.add_argument("--cross-entropy", choices=("auto", "chunked", "liger"), default="auto")
    parser.add_argument("--steps", type=int, default=6, help="timed, after 2 others")
    parser.add_argument("--budget-s", type=float, help="of timed steps, each case: fewer steps where they are slow")
    parser.add_argument("--peak-tflops", type=float, help="of the device, dense bf16 (H200 and H100: 989)")
    parser.add_argument("--out", type=Path, default=Path("train-speed.json"))
    arguments = parser.parse_args()
    cases = arguments.cases.split(",")
    if unknown := [case for case in cases if case not in CASES]:
        raise SystemExit(f"no cases {unknown}; there are {CASES}")
    results = kept_results(arguments.out, settings_of(arguments), cases)
    for case in cases:
        results.append(run_case(case, arguments))
        print(json.dumps(results[-1]), flush=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    table = markdown(results)
    arguments.out.with_suffix(".md").write_text(table)
    print(table)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What results of one table have in common."""
    asked = {name: getattr(arguments, name) for name in ("shape", "heads", "length", "rows", "chunk")}
    return asked | {"torch": torch.__version__, "device": device_name()}


def kept_results(path: Path, settings: dict[str, Any], cases: Sequence[str]) -> list[dict[str, Any]]:
    """What the file holds of the same settings, but of the cases that are measured now."""
    earlier = json.loads(path.read_text()) if path.exists() else []
    alike = [result for result in earlier if settings.items() <= result.items()]
    if others := len(earlier) - len(alike):
        print(f"{others} results of other settings are left out of {path}", file=sys.stderr)
    return [result for result in alike if result["case"] not in cases]


def run_case(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    told = {"case": case} | settings_of(arguments)
    try:
        return told | measure(case, arguments)
    except torch.cuda.OutOfMemoryError as error:
        return told | {"error": f"out of memory: {str(error)[:120]}"}
    except ImportError as error:
        return told | {"error": str(error)}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    backbone = random_backbone(arguments.shape, quantised=case.partition("-")[2])
    heads_config = HeadsConfig(
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        num_heads=arguments.heads,
        vocabulary="shared" if case == "m1-shared" else "own",
    )
    heads = MedusaHeads.initialised(heads_config, backbone.lm_head_weight)
    joint = JointConfig() if case.startswith("m2") else None
    config = TrainerConfig(
        batch_size=arguments.rows,
        max_length=arguments.length,
        packing=True,
        activation_checkpointing=True,
        chunk_size=arguments.chunk,
        cross_entropy=arguments.cross_entropy,
        loss=HeadsLossConfig(kind="tokens"),
        joint=joint,
    )
    rows = random_rows((arguments.steps + WARMUP) * arguments.rows, arguments.length, backbone.vocab_size)
    plain = case.endswith("-plain")
    trainer = Trainer(backbone, heads, rows, replace(config, packing=not plain))
    step = plain_step(trainer) if plain else lambda: trainer.train_step(trainer.next_batches())
    steps, seconds, tokens, positions = timed(step, trainer, arguments.steps, arguments.budget_s)
    flops = flops_of(trainer, body_weights(arguments.shape), tokens, positions)
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "positions_per_second": round(positions / seconds, 1),
        "steps": steps,
        "seconds_a_step": round(seconds / steps, 4),
        "peak_memory_gib": memory and round(memory, 2),
        "tflops": round(flops / seconds / 1e12, 2),
        "share_of_peak": arguments.peak_tflops and round(flops / seconds / 1e12 / arguments.peak_tflops, 3),
        "cross_entropy": "whole logits" if plain else ("chunked" if trainer.fused is None else "liger"),
    }


def random_backbone(shape: str, quantised: str) -> Backbone:
    model = random_model(shape, "cuda" if torch.cuda.is_available() else "cpu")
    if quantised in ("8bit", "4bit"):
        from medusa.training.quantisation import quantise

        quantise(model, quantised)
    return Backbone(model, name=shape, digest="")


def random_model(shape: str, device: str) -> PreTrainedModel:
    config = LlamaConfig(**({"vocab_size": 32000, "max_position_embeddings": 4096} | SHAPES[shape]))
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def body_weights(shape: str) -> int:
    """Of the decoder layers and norms, however they are stored: packed weights of 4 bits count as what they are."""
    named = random_model(shape, "meta").named_parameters()
    return sum(p.numel() for name, p in named if "embed" not in name and "lm_head" not in name)


def random_rows(count: int, longest: int, vocab: int) -> list[Row]:
    """Lengths as of chats: from an eighth of the longest up, a third of a row its prompt."""
    draw = random.Random(0)
    lengths = [draw.randint(longest // 8, longest) for _ in range(count)]
    ids = torch.randint(0, vocab, (longest,), generator=torch.Generator().manual_seed(0)).tolist()
    return [Row.of(ids[: length // 3], ids[length // 3 : length]) for length in lengths]


def plain_step(trainer: Trainer) -> Callable[[], torch.Tensor]:
    """The textbook way: all logits of all heads, then the losses; the trainer's own optimiser."""
    config, heads, backbone = trainer.config, trainer.heads, trainer.backbone
    weights = head_weights(heads.config.num_heads, config.head_decay)

    def step() -> torch.Tensor:
        (batch,) = trainer.next_batches()
        with torch.autocast(backbone.device.type, dtype=torch.bfloat16):
            if trainer.adaptation is None:
                hidden_BTd, weight_Vd = backbone.hidden_states(batch.tokens_BT), backbone.lm_head_weight
            else:
                teacher_NV = whole_logits(trainer, batch, teacher=True)
                backbone.model.train()
                hidden_BTd, weight_Vd = backbone.trainable_hidden_states(batch.tokens_BT), backbone.lm_head_weight
            hidden_Nd = hidden_BTd.flatten(0, 1)
            logits = torch.stack(
                [
                    heads.features(k, hidden_Nd) @ heads.vocabulary_weight(k, weight_Vd).T.to(hidden_Nd.dtype)
                    for k in range(heads.config.num_heads)
                ]
            )
            labels_NK = torch.full((len(hidden_Nd), heads.config.num_heads), IGNORE, device=hidden_Nd.device)
            labels_NK[batch.positions_N] = batch.labels_NK
            losses = [cross_entropy(x.float(), labels_NK[:, k], ignore_index=IGNORE) for k, x in enumerate(logits)]
            loss = sum(weight * part for weight, part in zip(weights, losses, strict=True))
            if trainer.adaptation is not None:
                student_NV = (hidden_Nd @ weight_Vd.T).float().log_softmax(-1)[batch.positions_N]
                kl = kl_div(student_NV, teacher_NV, log_target=True, reduction="batchmean")
                loss = kl + config.joint.heads_weight * loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trainer.optimiser.parameters.values()), 1.0)
        trainer.optimiser.step(config.lr)
        trainer.progress.step += 1
        return loss.detach()

    return step


@torch.no_grad()
def whole_logits(trainer: Trainer, batch: Any, teacher: bool) -> torch.Tensor:
    hidden_Nd, weight_Vd = trainer.adaptation.teacher(batch) if teacher else trainer.adaptation.student(batch)
    return (hidden_Nd @ weight_Vd.T).float().log_softmax(-1)


def timed(step: Callable[[], Any], trainer: Trainer, steps: int, budget_s: float | None) -> tuple[int, float, int, int]:
    """How many steps were timed, their seconds, real tokens and labelled positions. The last step of the warm-up tells
    how many fit the budget; at least one is timed."""
    for _ in range(WARMUP):
        synchronise()
        started = time.perf_counter()
        step()
    synchronise()
    if budget_s is not None:
        steps = max(min(steps, int(budget_s / (time.perf_counter() - started))), 1)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    rows = [trainer.rows[i] for s in range(trainer.step, trainer.step + steps) for i in trainer.sampler.global_rows(s)]
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise()
    return steps, time.perf_counter() - started, sum(map(len, rows)), sum(row.num_positions for row in rows)


def flops_of(trainer: Trainer, body: int, tokens: int, positions: int) -> float:
    model, heads = trainer.backbone.model, trainer.heads
    lm_head = trainer.backbone.lm_head_weight.numel()
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    of_heads = sum(p.numel() for p in heads.parameters())
    shared = lm_head * heads.config.num_heads if heads.config.vocabulary == "shared" else 0
    flops = 2.0 * body * tokens + 6.0 * of_heads * positions + 4.0 * shared * positions
    if trainer.adaptation is not None:  # teacher and student forward, the student's backward; KL of two LM heads
        flops += 2.0 * body * tokens + 2.0 * body * tokens + 6.0 * adapters * tokens + 6.0 * lm_head * positions
    return flops


def markdown(results: Sequence[dict[str, Any]]) -> str:
    names = ("case", "tokens_per_second", "steps", "peak_memory_gib", "tflops", "share_of_peak", "cross_entropy")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for result in results:
        cells = [str(result.get(name, "")) for name in names]
        if "error" in result:
            cells[1] = result["error"]
        lines.append("| " + " | ".join(cells) + " |")
    told = results[0]
    head = f"{told['shape']}, {told['heads']} heads, {told['rows']} rows of up to {told['length']} tokens, "
    return "\n".join([f"{head}torch {told['torch']}, {told['device']}", "", *lines, ""])


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    main()
