"""Conversations answered by the model itself, many at once: what distillation does with an Engine.

An Answerer holds one Engine and the one thread that may touch it. Any number of callers hand it blocks of
prompts and wait; their conversations share the engine's batch, so that it stays full while one block ends and
the next begins.

1. `answer` puts a block's conversations in line, then asks the thread to step until all of them are over.
2. The thread fills free places of the batch from the line, steps the engine, and hands out the new tokens.
3. A conversation with turns left goes to the head of the line: its next prompt is the token ids of all
   before, then those that the chat template puts around the next user turn. A reply never becomes text.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from medusa.config import strict
from medusa.loops import LoopFinder
from medusa.sampling import SamplingParams
from medusa.tokenizer import ChatTemplateError, ChatTokenizer

if TYPE_CHECKING:
    from medusa import Engine, Output
    from pipelines.prompt_files import Prompt


@strict
@dataclass(frozen=True, kw_only=True)
class ReplyConfig:
    """How the model answers. A reply that ends by `max_tokens` is kept as it is, without an EOS it did not
    write, or dropped with the rest of its conversation. With `cut_loops` a reply ends where a 4-gram comes
    for the third time: for small models, which fall into loops; long replies of any model repeat 4-grams.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 512
    truncated: Literal["keep", "drop"] = "keep"
    cut_loops: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.sampling_params("", 0)

    def sampling_params(self, conversation_id: str, turn: int) -> SamplingParams:
        """Seeded by (run seed, id, turn), so that a reply does not depend on its batch, block or worker."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
            seed=reply_seed(self.seed, conversation_id, turn),
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """One reply: `prompt_ids` is what the model read, `completion_ids` what it wrote (with its EOS)."""

    prompt_ids: list[int]
    completion_ids: list[int]
    finish_reason: str


@dataclass(slots=True)
class Conversation:
    """A prompt while it is answered. It is over when `over` is true; `reason` tells why it ended before its
    last turn: "length" (a truncated reply was dropped), or a failure, with `detail` in words.
    """

    prompt: Prompt
    turns: list[Turn] = field(default_factory=list)
    over: bool = False
    reason: str | None = None
    detail: str = ""
    prompt_ids: list[int] = field(default_factory=list)
    reply_ids: list[int] = field(default_factory=list)
    loop: LoopFinder = field(default_factory=LoopFinder)

    @property
    def outcome(self) -> Literal["written", "skipped", "failed"]:
        """Written as soon as one turn is: the turns before an early end stand on their own."""
        if self.turns:
            return "written"
        return "skipped" if self.reason == "length" else "failed"

    def end(self, reason: str | None = None, detail: str = "") -> None:
        self.over, self.reason, self.detail = True, reason, detail


class Answerer:
    """One engine for the blocks that several threads hand to `answer`; `build_engine` runs in its thread."""

    def __init__(self, build_engine: Callable[[], Engine], config: ReplyConfig) -> None:
        self._config = config
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._waiting: deque[Conversation] = deque()
        self._asked: dict[str, Conversation] = {}
        self._steps = self._replies_stepped = 0
        self._engine = self._thread.submit(build_engine).result()

    def answer(self, prompts: Sequence[Prompt]) -> list[Conversation]:
        """The conversations in the order of `prompts`, all over. Raises what the engine raises."""
        conversations = [Conversation(prompt) for prompt in prompts]
        for conversation in conversations:
            self._waiting.append(conversation)
        while not all(conversation.over for conversation in conversations):
            self._thread.submit(self._advance).result()
        return conversations

    def close(self) -> None:
        """Ends the engine, in its thread."""
        self._thread.submit(self._engine.close).result()
        self._thread.shutdown()

    def take_counters(self) -> tuple[int, int]:
        """Engine steps since the last call, and the replies under way summed over them."""
        return self._thread.submit(self._take_counters).result()

    def _take_counters(self) -> tuple[int, int]:
        counters = self._steps, self._replies_stepped
        self._steps = self._replies_stepped = 0
        return counters

    def _advance(self) -> None:
        """Steps until a conversation is over; other callers' blocks move on with it."""
        over = self._fill()
        while not over and self._asked:
            if not self._engine.has_unfinished():
                raise RuntimeError(
                    f"the engine has nothing left to do, yet {len(self._asked)} replies are not finished"
                )
            self._steps += 1
            self._replies_stepped += len(self._asked)
            for output in self._engine.step():
                over |= self._receive(output)
            over |= self._fill()

    def _fill(self) -> bool:
        """Asks as many waiting conversations as the batch has room for; true if one is over at once."""
        over = False
        while self._waiting and len(self._asked) < self._engine.max_batch_size:
            over |= self._ask(self._waiting.popleft())
        return over

    def _ask(self, conversation: Conversation) -> bool:
        params = self._config.sampling_params(conversation.prompt.id, len(conversation.turns))
        try:
            conversation.prompt_ids = self._next_prompt(conversation)
            request_id = self._engine.add(conversation.prompt_ids, params)
        except ChatTemplateError as error:
            conversation.end("chat template", str(error))
        except ValueError as error:
            conversation.end("prompt refused", str(error))
        else:
            conversation.reply_ids, conversation.loop = [], LoopFinder()
            self._asked[request_id] = conversation
        return conversation.over

    def _next_prompt(self, conversation: Conversation) -> list[int]:
        prompt, tokenizer = conversation.prompt, self._engine.tokenizer
        if conversation.turns:
            last = conversation.turns[-1]
            message = prompt.turns[len(conversation.turns)]
            return tokenizer.next_turn([*last.prompt_ids, *last.completion_ids], message)
        return first_prompt(tokenizer, prompt)

    def _receive(self, output: Output) -> bool:
        """Takes a reply's new tokens; true if its conversation is over."""
        conversation = self._asked.get(output.request_id)
        if conversation is None:  # a reply that was aborted for its loop
            return False
        conversation.reply_ids += output.token_ids
        looped = self._config.cut_loops and any(map(conversation.loop.push, output.token_ids))
        if not looped and output.finished is None:
            return False
        del self._asked[output.request_id]
        if output.finished is None:
            self._engine.abort(output.request_id)
        reason = "loop" if looped or output.finished is None else output.finished.finish_reason
        self._finish_turn(conversation, reason)
        return conversation.over

    def _finish_turn(self, conversation: Conversation, finish_reason: str) -> None:
        if finish_reason == "abort":
            conversation.end("aborted", "the engine gave the reply up")
        elif finish_reason == "length" and self._config.truncated == "drop":
            conversation.end("length", f"the reply did not end within {self._config.max_tokens} tokens")
        else:
            kept = conversation.reply_ids[: conversation.loop.cut if finish_reason == "loop" else None]
            conversation.turns.append(Turn(conversation.prompt_ids, kept, finish_reason))
            if len(conversation.turns) == len(conversation.prompt.turns):
                conversation.end()
            else:
                self._waiting.appendleft(conversation)


def first_prompt(tokenizer: ChatTokenizer, prompt: Prompt) -> list[int]:
    """What the model reads before its first reply."""
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return tokenizer.encode_chat([*system, {"role": "user", "content": prompt.turns[0]}])


def reply_seed(run_seed: int, conversation_id: str, turn: int) -> int:
    """A 63-bit seed that is the same in every process and for every order of work."""
    digest = hashlib.sha256(f"{run_seed}\n{turn}\n{conversation_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
