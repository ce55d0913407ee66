"""Which training recipe gives the most tokens a step? One distillation, several recipes, one table.

    python -m benchmarks.train_recipes distil BACKBONE WORK --train chat_train.jsonl.gz --heldout heldout_chat.jsonl
    python -m benchmarks.train_recipes train  BACKBONE WORK --recipes m1-paper,m2-lora,hydra --budget-s 60
    python -m benchmarks.train_recipes table  WORK
    python -m benchmarks.train_speed --shape vicuna-7b            (tokens a second and memory, another file)

`distil` writes WORK/replies.jsonl.gz: the backbone's replies to the training prompts, and to each evaluation set at
each temperature. `train` trains each recipe for at most its budget and adds WORK/results/NAME.json; `table` makes
WORK/results.md and results.json.

Tokens a step are exact for lossless decoding (sample, then match): the offline walk over replies that the model itself
gave, cut where they loop. Trees of 64 nodes are grown on rows kept back from training. A recipe that changes the model
answers the evaluation prompts itself, and is compared with the base on the base's replies and on reference replies.
No Ray, no MLflow: torch, transformers, peft and safetensors.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from medusa import Engine, SamplingParams
from medusa.calibration import ReplyGuesses, grow_on, guess_replies, head_accuracy, tokens_per_step
from medusa.checkpoint import BackboneRef, Calibration, CheckpointMeta, save_checkpoint
from medusa.heads import DraftHeads, HeadsConfig, MedusaHeads
from medusa.hydra import HydraHeads
from medusa.loops import cut_at_loop
from medusa.model import Backbone
from medusa.quality import compare
from medusa.tokenizer import ChatTokenizer
from medusa.training.batch import Row
from medusa.training.schedule import HeadsLossConfig, JointConfig, TrainerConfig
from medusa.training.trainer import Trainer
from medusa.tree import TokenTree, grow

WIDTH = 10
TREE_SIZES = (1, 2, 4, 8, 16, 32, 64)
HELD_BACK = 1000  # training replies kept for growing trees
Reply = dict[str, Any]  # set, temperature, prompt_ids, reply_ids
TOKENS, SOFT, LK = (HeadsLossConfig(kind=kind) for kind in ("tokens", "soft", "lk"))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained and how. `epochs` is cut to the budget; the schedule then ends with it."""

    about: str
    kind: str = "medusa"
    num_heads: int = 4
    num_layers: int = 1
    vocabulary: str = "own"
    trainer: dict[str, Any] = field(default_factory=dict)
    loss: HeadsLossConfig = TOKENS
    joint: JointConfig | None = None


M1 = {"epochs": 10, "batch_size": 64, "lr": 1e-3, "warmup_ratio": 0.03, "weight_decay": 0.01}
HALF = HeadsLossConfig(kind="soft", tokens_share=0.5)
LORA = JointConfig(rank=64, alpha=64.0, dropout=0.0, heads_weight=0.2, heads_only_ratio=0.3)
RECIPES = {
    "m1-paper": Recipe(about="Medusa-1, tokens, 4 epochs, no decay", trainer=M1 | {"epochs": 4, "weight_decay": 0.0}),
    "m1-long": Recipe(about="Medusa-1, tokens, 10 epochs", trainer=M1),
    "m1-decay": Recipe(about="Medusa-1, tokens, weight decay 0.1", trainer=M1 | {"weight_decay": 0.1}),
    "m1-shared": Recipe(about="Medusa-1, shared LM head, 4 layers", vocabulary="shared", num_layers=4, trainer=M1),
    "m1-soft": Recipe(about="Medusa-1, soft targets", trainer=M1, loss=SOFT),
    "m1-soft-cold": Recipe(
        about="Medusa-1, soft targets at T 0.5", trainer=M1, loss=replace(SOFT, teacher_temperature=0.5)
    ),
    "m1-soft-half": Recipe(about="Medusa-1, soft targets and tokens", trainer=M1, loss=HALF),
    "m1-lk": Recipe(about="Medusa-1, LK hybrid", trainer=M1, loss=LK),
    "m1-2layers": Recipe(about="Medusa-1, soft targets, 2 layers", num_layers=2, trainer=M1, loss=SOFT),
    "m1-head-lr": Recipe(
        about="Medusa-1, soft targets, later heads faster",
        trainer=M1 | {"head_lr_scales": (1.0, 1.2, 1.5, 2.0)},
        loss=SOFT,
    ),
    "hydra": Recipe(about="Hydra, tokens", kind="hydra", trainer=M1),
    "hydra-soft": Recipe(about="Hydra, soft targets", kind="hydra", trainer=M1, loss=SOFT),
    "hydra-2layers": Recipe(about="Hydra, soft targets, 2 layers", kind="hydra", num_layers=2, trainer=M1, loss=SOFT),
    "hydra-4layers": Recipe(about="Hydra, soft targets, 4 layers", kind="hydra", num_layers=4, trainer=M1, loss=SOFT),
    "hydra-shared": Recipe(
        about="Hydra, soft targets, shared LM head, 4 layers",
        kind="hydra",
        num_layers=4,
        vocabulary="shared",
        trainer=M1,
        loss=SOFT,
    ),
    "m2-lora": Recipe(about="Medusa-2, LoRA r64, two stages, lambda 0.2", trainer=M1, joint=LORA),
    "m2-lora-1": Recipe(about="Medusa-2, LoRA r64, lambda 1", trainer=M1, joint=replace(LORA, heads_weight=1.0)),
    "m2-lora-soft": Recipe(
        about="Medusa-2, LoRA r64, soft targets, lambda 1", trainer=M1, loss=SOFT, joint=replace(LORA, heads_weight=1.0)
    ),
    "m2-sine": Recipe(
        about="Medusa-2, LoRA r64, from the start, sine to 0.2",
        trainer=M1,
        joint=replace(LORA, heads_only_ratio=0.0, heads_weight_schedule="sine"),
    ),
    "m2-full": Recipe(
        about="Medusa-2, all weights, lambda 0.2", trainer=M1, joint=replace(LORA, method="full", rank=1)
    ),
    "m2-hydra": Recipe(about="Hydra with joint LoRA r64, lambda 0.2", kind="hydra", trainer=M1, loss=SOFT, joint=LORA),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    distil = commands.add_parser("distil", help="the backbone's replies, once")
    distil.add_argument("backbone", type=Path)
    distil.add_argument("work", type=Path)
    distil.add_argument("--train", type=Path, required=True)
    distil.add_argument("--heldout", type=Path, required=True)
    distil.add_argument("--mt-bench", type=Path)
    distil.add_argument("--limit", type=int, help="training prompts (default: all)")
    distil.add_argument("--eval-limit", type=int, help="prompts of each evaluation set (default: all)")
    distil.add_argument("--train-temperature", type=float, default=0.7)
    distil.add_argument("--samples", type=int, default=1, help="replies to each training prompt")
    distil.add_argument("--temperatures", type=numbers, default=[0.0, 0.7, 1.0])
    train = commands.add_parser("train", help="recipes, each within its budget")
    train.add_argument("backbone", type=Path)
    train.add_argument("work", type=Path)
    train.add_argument("--recipes", default="m1-paper,m1-soft,m1-lk,hydra,m2-lora", help=f"of {', '.join(RECIPES)}")
    train.add_argument("--budget-s", type=float, default=60.0, help="of training, each recipe")
    train.add_argument("--set", nargs="*", default=[], help="trainer numbers for all recipes, such as lr=2e-3")
    for command in (distil, train):
        command.add_argument("--max-tokens", type=int, default=256, help="of a reply")
        command.add_argument("--batch-size", type=int, default=256, help="of decoding")
        command.add_argument("--device", default=None)
        command.add_argument("--dtype", default=None)
        command.add_argument("--max-model-len", type=int, default=1024)
    table = commands.add_parser("table", help="WORK/results.md from WORK/results/*.json")
    table.add_argument("work", type=Path)
    arguments = parser.parse_args()
    {"distil": run_distil, "train": run_train, "table": run_table}[arguments.command](arguments)


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


# --- distil ---


def run_distil(arguments: argparse.Namespace) -> None:
    backbone, tokenizer = load(arguments)
    train = [turns for turns in read_prompts(arguments.train)][: arguments.limit]
    seen = {prompt for prompt, _ in train}
    sets = {"heldout_chat": [row for row in read_prompts(arguments.heldout) if row[0] not in seen]}
    if arguments.mt_bench:
        sets["mt_bench"] = list(read_prompts(arguments.mt_bench))
    asked = [
        Asked("train", arguments.train_temperature, prompt, seed)
        for seed in range(arguments.samples)
        for prompt, _ in train
    ]
    for name, rows in sets.items():
        for temperature in arguments.temperatures:
            asked += [Asked(name, temperature, prompt, 0) for prompt, _ in rows[: arguments.eval_limit]]
    started = time.perf_counter()
    replies = answer(backbone, tokenizer, asked, arguments)
    seconds = time.perf_counter() - started
    replies += [
        reference
        for name, rows in sets.items()
        for prompt, reply in rows[: arguments.eval_limit]
        if reply is not None and (reference := reference_row(tokenizer, f"{name}_reference", prompt, reply))
    ]
    arguments.work.mkdir(parents=True, exist_ok=True)
    with gzip.open(arguments.work / "replies.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(reply) + "\n" for reply in replies)
    tokens = sum(len(reply["reply_ids"]) for reply in replies)
    say(f"{len(replies)} replies, {tokens} tokens after cutting loops, {seconds:.1f} s of decoding")


@dataclass(frozen=True)
class Asked:
    set: str
    temperature: float
    prompt: str
    seed: int


def read_prompts(path: Path) -> Iterator[tuple[str, str | None]]:
    """First user turns, with the reference reply where the set has one."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for line in file:
            row = json.loads(line)
            if "messages" in row:
                texts = [m["content"] for m in row["messages"] if m["role"] in ("user", "assistant")]
                yield texts[0], texts[1] if len(texts) > 1 else None
            else:
                yield (row["turns"][0] if "turns" in row else row["prompt"]), None


def answer(
    backbone: Backbone, tokenizer: ChatTokenizer, asked: Sequence[Asked], arguments: argparse.Namespace
) -> list[Reply]:
    """Plain decoding of everything asked, in one engine; replies cut where they loop."""
    longest = arguments.max_model_len - arguments.max_tokens
    kept, prompts = [], []
    for item in asked:
        ids = tokenizer.encode_chat([{"role": "user", "content": item.prompt}])
        if len(ids) < longest:
            kept.append(item)
            prompts.append(ids)
    engine = Engine(
        backbone,
        tokenizer,
        max_batch_size=arguments.batch_size,
        max_model_len=arguments.max_model_len,
        speculation="off",
    )
    params = [
        SamplingParams(
            max_tokens=arguments.max_tokens, temperature=item.temperature, seed=1_000_003 * item.seed + number
        )
        for number, item in enumerate(kept)
    ]
    done = engine.generate(prompts, params)
    return [
        {
            "set": item.set,
            "temperature": item.temperature,
            "prompt_ids": ids,
            "reply_ids": completion.token_ids[: cut_at_loop(completion.token_ids)],
        }
        for item, ids, completion in zip(kept, prompts, done, strict=True)
    ]


def reference_row(tokenizer: ChatTokenizer, name: str, prompt: str, reply: str) -> Reply | None:
    """A reference reply as the chat template renders it; None where it is not the prompt's continuation."""
    question = [{"role": "user", "content": prompt}]
    prompt_ids = tokenizer.encode_chat(question)
    whole = tokenizer.encode_chat([*question, {"role": "assistant", "content": reply}], add_generation_prompt=False)
    if whole[: len(prompt_ids)] != prompt_ids or len(whole) > 1024:
        return None
    return {"set": name, "temperature": None, "prompt_ids": prompt_ids, "reply_ids": whole[len(prompt_ids) :]}


# --- train ---


def run_train(arguments: argparse.Namespace) -> None:
    with gzip.open(arguments.work / "replies.jsonl.gz", "rt") as file:
        replies = [json.loads(line) for line in file]
    names = arguments.recipes.split(",")
    if unknown := sorted(set(names) - set(RECIPES)):
        raise SystemExit(f"no recipes {unknown}; there are {sorted(RECIPES)}")
    (arguments.work / "results").mkdir(exist_ok=True)
    for name in names:
        say(f"--- {name}: {RECIPES[name].about}")
        result = train_and_evaluate(name, RECIPES[name], replies, arguments)
        (arguments.work / "results" / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        say_result(result)
        gc.collect()  # an engine and its graphs are a circle of references
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    run_table(arguments)


def say_result(result: dict[str, Any]) -> None:
    training = result["training"]
    say(f"loss {training['first_record']['loss']:.3f} -> {training['last_record']['loss']:.3f}")
    for name, found in result["tokens_per_step"].items():
        say(f"{name}: {found['tokens_per_step']:.3f} tokens a step, top-1 {found['top1']}")
    for name, found in result.get("quality", {}).items():
        say(f"{name}: KL {found['kl']:.4f}, perplexity {found['perplexity_ratio']:.4f} of the base's")


def train_and_evaluate(
    name: str, recipe: Recipe, replies: list[Reply], arguments: argparse.Namespace
) -> dict[str, Any]:
    rows = [reply for reply in replies if reply["set"] == "train"]
    held_back = min(HELD_BACK, len(rows) // 10)
    trained, kept_back = rows[held_back:], rows[:held_back]
    backbone, tokenizer = load(arguments)
    heads, training = train_recipe(recipe, [to_row(reply) for reply in trained], backbone, arguments)
    heads = heads.eval().requires_grad_(False).to(backbone.dtype)
    evaluation = [reply for reply in replies if reply["set"] in ("heldout_chat", "mt_bench")]
    result: dict[str, Any] = {"recipe": name, "about": recipe.about, "device": device_name(), "training": training}
    if recipe.joint is not None:
        base, _ = load(arguments)
        result["quality"] = quality(base, backbone, replies)
        evaluation, kept_back = own_replies(backbone, tokenizer, evaluation, kept_back, arguments)
    if recipe.joint is None and isinstance(heads, MedusaHeads):
        keep_heads(arguments.work / "heads" / name, backbone, tokenizer, heads, kept_back)
    return result | measure(backbone, heads, evaluation, kept_back)


def keep_heads(
    folder: Path, backbone: Backbone, tokenizer: ChatTokenizer, heads: MedusaHeads, kept_back: list[Reply]
) -> None:
    """Writes the heads with the calibration of the rows kept back, for an engine to use: WORK/heads/NAME."""
    guessed = list(guess_replies(backbone, heads, map(to_pair, kept_back), WIDTH, batch_size=64))
    accuracy, positions = head_accuracy(guessed, heads.config.num_heads, WIDTH)
    growth, whole_paths = grow_on(guessed, accuracy, max(TREE_SIZES))
    trees = [TokenTree.from_paths(growth[: size - 1]) for size in TREE_SIZES]
    calibration = Calibration(
        accuracy=accuracy,
        num_positions=positions,
        temperature=kept_back[0]["temperature"],
        tokens_per_step=[tokens_per_step(guessed, tree) for tree in trees],
        growth=[list(path) for path in growth],
        path_accuracy=list(whole_paths),
    )
    belongs_to = BackboneRef(name=backbone.name, weights_digest=backbone.digest, tokenizer_digest=tokenizer.digest)
    meta = CheckpointMeta(
        heads=heads.config, backbone=belongs_to, calibration=calibration, trees=[tree.to_list() for tree in trees]
    )
    save_checkpoint(folder, heads, meta)


def train_recipe(
    recipe: Recipe, rows: list[Row], backbone: Backbone, arguments: argparse.Namespace
) -> tuple[DraftHeads, dict[str, Any]]:
    """Trains in place, for as many steps as fit the budget; a joint recipe's backbone ends merged."""
    changes = {key: number(value) for key, value in (item.split("=") for item in arguments.set)}
    config = TrainerConfig(
        **(
            {"max_length": arguments.max_model_len, "chunk_size": 4096, "bucket_batches": 32} | recipe.trainer | changes
        ),
        loss=recipe.loss,
        joint=recipe.joint,
    )
    shape = HeadsConfig(
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        num_heads=recipe.num_heads,
        num_layers=recipe.num_layers,
        vocabulary=recipe.vocabulary,  # type: ignore[arg-type]
    )
    kind = {"medusa": MedusaHeads, "hydra": HydraHeads}[recipe.kind]

    def trainer(of: Backbone, config: TrainerConfig) -> Trainer:
        return Trainer(of, kind.initialised(shape, of.lm_head_weight), rows, config)

    step_s = time_steps(trainer(load(arguments)[0], joint_at_once(config)))
    planned = config.total_steps(-(-len(rows) // config.batch_size))
    steps = max(min(planned, int(arguments.budget_s / step_s)), 1)
    real = trainer(backbone, replace(config, max_steps=steps))
    say(f"{step_s * 1e3:.1f} ms a step; {steps} of {planned} steps")
    started, first, record = time.perf_counter(), None, {}
    while not real.finished:
        metrics = real.train_step(real.next_batches())
        if metrics.step % max(steps // 10, 1) == 0 or real.finished:
            record = real.take_record(metrics)
            first = first or record
    synchronise()
    seconds = time.perf_counter() - started
    if real.adaptation is not None:
        merge(real, backbone)
    epochs = steps / real.sampler.steps_per_epoch
    told = {"steps": steps, "epochs": round(epochs, 2), "seconds": round(seconds, 1), "tokens": real.tokens_seen}
    return real.heads, told | {"first_record": first, "last_record": record}


def joint_at_once(config: TrainerConfig) -> TrainerConfig:
    """For timing: no first stage, which is cheaper than what follows."""
    return config if config.joint is None else replace(config, joint=replace(config.joint, heads_only_ratio=0.0))


def time_steps(trainer: Trainer, warmup: int = 3, timed: int = 8) -> float:
    for step in range(warmup + timed):
        if step == warmup:
            synchronise()
            started = time.perf_counter()
        trainer.train_step(trainer.next_batches())
    synchronise()
    return (time.perf_counter() - started) / timed


def merge(trainer: Trainer, backbone: Backbone) -> None:
    """The adapters into the weights, in place; full fine-tuning back to the type it is served in."""
    from peft.tuners.lora import LoraLayer

    model = backbone.model.eval()
    dtype = torch.bfloat16 if trainer._half else torch.float32
    with torch.no_grad():
        for parent in list(model.modules()):
            for child_name, layer in list(parent.named_children()):
                if isinstance(layer, LoraLayer):
                    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
                    weight = layer.base_layer.weight
                    weight.copy_((weight.float() + layer.scaling["default"] * (b @ a)).to(weight.dtype))
                    setattr(parent, child_name, layer.base_layer)
    model.gradient_checkpointing_disable()
    model.to(dtype).requires_grad_(False)


def own_replies(
    backbone: Backbone,
    tokenizer: ChatTokenizer,
    evaluation: list[Reply],
    kept_back: list[Reply],
    arguments: argparse.Namespace,
) -> tuple[list[Reply], list[Reply]]:
    """What the changed model answers to the same prompts; the rows for its trees too."""
    texts = [*evaluation, *kept_back]
    engine = Engine(
        backbone,
        tokenizer,
        max_batch_size=arguments.batch_size,
        max_model_len=arguments.max_model_len,
        speculation="off",
    )
    params = [
        SamplingParams(max_tokens=arguments.max_tokens, temperature=reply["temperature"], seed=number)
        for number, reply in enumerate(texts)
    ]
    done = engine.generate([r["prompt_ids"] for r in texts], params)
    answered = [
        reply | {"reply_ids": c.token_ids[: cut_at_loop(c.token_ids)]} for reply, c in zip(texts, done, strict=True)
    ]
    return answered[: len(evaluation)], answered[len(evaluation) :]


def measure(backbone: Backbone, heads: DraftHeads, evaluation: list[Reply], kept_back: list[Reply]) -> dict[str, Any]:
    """Tokens a step of each set and temperature, with trees of 64 nodes from rows kept back, and from the set's own
    accuracies (as some published figures do)."""
    num_heads = heads.config.num_heads
    on_kept = list(guess_replies(backbone, heads, map(to_pair, kept_back), WIDTH, batch_size=64))
    tree = measured_tree(on_kept, num_heads)
    tokens: dict[str, Any] = {}
    for name, temperature in sorted({(r["set"], r["temperature"]) for r in evaluation}):
        rows = [to_pair(r) for r in evaluation if (r["set"], r["temperature"]) == (name, temperature)]
        guessed = list(guess_replies(backbone, heads, rows, WIDTH, batch_size=64))
        accuracy, positions = head_accuracy(guessed, num_heads, WIDTH)
        tokens[f"{name}@{temperature}"] = {
            "tokens_per_step": tokens_per_step(guessed, tree),
            "own_tree": tokens_per_step(guessed, grow(accuracy, 64)),
            "top1": [round(head[0], 4) for head in accuracy],
            "positions": positions,
        }
    return {"tokens_per_step": tokens, "tree": tree.to_list()}


def measured_tree(guessed: list[ReplyGuesses], num_heads: int) -> TokenTree:
    accuracy, _ = head_accuracy(guessed, num_heads, WIDTH)
    return TokenTree.from_paths(grow_on(guessed, accuracy, 64)[0])


def quality(base: Backbone, model: Backbone, replies: list[Reply]) -> dict[str, Any]:
    """Against the base, on its own replies at temperature 0 and 1 and on reference replies."""
    wanted = {"heldout_chat@0.0", "heldout_chat@1.0", "heldout_chat_reference@None"}
    found: dict[str, Any] = {}
    for name in sorted(wanted):
        rows = [to_pair(reply) for reply in replies if f"{reply['set']}@{reply['temperature']}" == name]
        if rows:
            closeness = compare(base, model, rows, batch_size=64)
            found[name] = asdict(closeness) | {"perplexity_ratio": closeness.perplexity_ratio}
    return found


# --- table ---


def run_table(arguments: argparse.Namespace) -> None:
    results = [json.loads(path.read_text()) for path in sorted((arguments.work / "results").glob("*.json"))]
    columns = sorted({key for result in results for key in result["tokens_per_step"]})
    quality_sets = sorted({key for result in results for key in result.get("quality", {})})
    header = ["recipe", "epochs", "s", *columns, *(f"ppl ratio {key}" for key in quality_sets), "KL"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for result in results:
        training, quality_of = result["training"], result.get("quality", {})
        cells = [f"{result['recipe']}: {result['about']}", f"{training['epochs']:g}", f"{training['seconds']:g}"]
        cells += [
            f"{result['tokens_per_step'][c]['tokens_per_step']:.3f}" if c in result["tokens_per_step"] else ""
            for c in columns
        ]
        cells += [f"{quality_of[key]['perplexity_ratio']:.4f}" if key in quality_of else "1" for key in quality_sets]
        cells.append(f"{quality_of['heldout_chat@0.0']['kl']:.4f}" if "heldout_chat@0.0" in quality_of else "0")
        lines.append("| " + " | ".join(cells) + " |")
    devices = ", ".join(sorted({result["device"] for result in results}))
    text = (
        f"Tokens a step, 64-node trees grown on rows kept back from training ({devices}).\n\n" + "\n".join(lines) + "\n"
    )
    (arguments.work / "results.md").write_text(text)
    (arguments.work / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(text)


# --- shared ---


def load(arguments: argparse.Namespace) -> tuple[Backbone, ChatTokenizer]:
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    backbone = Backbone.from_pretrained(arguments.backbone, dtype=dtype, device=arguments.device)
    return backbone, ChatTokenizer.from_pretrained(arguments.backbone)


def to_pair(reply: Reply) -> tuple[list[int], list[int]]:
    return reply["prompt_ids"], reply["reply_ids"]


def to_row(reply: Reply) -> Row:
    return Row.of(*to_pair(reply))


def number(text: str) -> Any:
    return json.loads(text)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
