"""The backbone's replies to the evaluation sets and to the training prompts, as many as the budget allows."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from benchmarks.train_recipes.machine import load, make_engine, say
from benchmarks.train_recipes.replies import (
    LONGEST_REFERENCE,
    Asked,
    Reply,
    add_replies,
    answer,
    key_of,
    read_prompts,
    read_replies,
)
from medusa.tokenizer import ChatTokenizer

Prompts = list[tuple[str, str | None]]


def distil(arguments: argparse.Namespace) -> None:
    """Evaluation sets first, since nothing is measured without them; then each training prompt once at the first
    temperature, again at the next. Ends before the wave that would not fit the budget if it took as long as the last
    (not as the longest: the first compiles kernels and captures graphs)."""
    started = time.perf_counter()
    backbone, tokenizer = load(arguments)
    whole: Prompts = list(read_prompts(arguments.train))
    sets, train = evaluation_sets(arguments, whole), whole[: arguments.limit]
    present = {key_of(reply) for reply in read_replies(arguments.work)}
    references = [
        reference
        for name, prompts in {**sets, "train": train}.items()
        for reference in references_of(tokenizer, name, prompts)
        if key_of(reference) not in present
    ]
    add_replies(arguments.work, references)
    asked = [ask for ask in everything(arguments, tokenizer, sets, train) if ask.key not in present]
    say(f"{len(present)} replies are there, {len(asked)} are wanted; {time.perf_counter() - started:.1f} s so far")
    engine = make_engine(backbone, tokenizer, arguments)
    tokens = answered = 0
    last_wave_s = 0.0
    for start in range(0, len(asked), arguments.wave):
        began = time.perf_counter()
        if arguments.budget_s is not None and began - started + last_wave_s > arguments.budget_s:
            break
        replies = answer(engine, asked[start : start + arguments.wave], arguments.max_tokens)
        add_replies(arguments.work, replies)
        last_wave_s = time.perf_counter() - began
        answered += len(replies)
        tokens += sum(len(reply["reply_ids"]) for reply in replies)
        seconds = time.perf_counter() - started
        say(f"{answered} of {len(asked)} replies, {tokens} tokens after cutting loops, {seconds:.1f} s in all")
    if answered < len(asked):
        say(
            f"the budget of {arguments.budget_s:g} s is spent; {len(asked) - answered} replies are left for another run"
        )


def evaluation_sets(arguments: argparse.Namespace, train: Prompts) -> dict[str, Prompts]:
    seen = {prompt for prompt, _ in train}
    sets = {"heldout_chat": [row for row in read_prompts(arguments.heldout) if row[0] not in seen]}
    if arguments.mt_bench:
        sets["mt_bench"] = list(read_prompts(arguments.mt_bench))
    return {name: prompts[: arguments.eval_limit] for name, prompts in sets.items()}


def everything(
    arguments: argparse.Namespace, tokenizer: ChatTokenizer, sets: dict[str, Prompts], train: Prompts
) -> list[Asked]:
    """In the order in which it is asked; prompts that leave no room for a reply are left out."""
    longest = arguments.max_model_len - arguments.max_tokens
    asked = []
    for name, prompts in {**sets, "train": train}.items():
        fitting = [(number, ids) for number, ids in prompt_ids(tokenizer, prompts) if len(ids) < longest]
        temperatures: Sequence[float] = arguments.train_temperatures if name == "train" else arguments.temperatures
        for place, temperature in enumerate(temperatures):
            again = temperatures[:place].count(temperature)
            asked += [Asked(name, temperature, number, again, ids) for number, ids in fitting]
    return asked


def prompt_ids(tokenizer: ChatTokenizer, prompts: Prompts) -> list[tuple[int, tuple[int, ...]]]:
    return [
        (number, tuple(tokenizer.encode_chat([{"role": "user", "content": prompt}])))
        for number, (prompt, _) in enumerate(prompts)
    ]


def references_of(tokenizer: ChatTokenizer, name: str, prompts: Prompts) -> list[Reply]:
    """Reference replies as the chat template renders them, but those that are not their prompt's continuation."""
    found = []
    for number, (prompt, reply) in enumerate(prompts):
        if reply is None:
            continue
        question = [{"role": "user", "content": prompt}]
        ids = tokenizer.encode_chat(question)
        whole = tokenizer.encode_chat([*question, {"role": "assistant", "content": reply}], add_generation_prompt=False)
        if whole[: len(ids)] == ids and len(whole) <= LONGEST_REFERENCE:
            of_set = {"set": f"{name}_reference", "temperature": None, "number": number, "round": 0}
            found.append(of_set | {"prompt_ids": ids, "reply_ids": whole[len(ids) :]})
    return found
