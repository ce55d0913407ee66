"""Replies that follow a grammar: which tokens may come next at each node of a tree.

The matching is llguidance's (the extra `grammar`). What stands here is its use on trees: a matcher follows a reply, and
walks down the paths of a step's tree and back, so that a node's mask is what plain decoding would have after its path.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from medusa.tokenizer import ChatTokenizer

MAX_KEPT = 64  # compiled grammars that are kept for later requests
# Models indent as they like, but a reply must not consist of blanks.
_JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\r\t]{0,24}"}


class GrammarError(ValueError):
    """The grammar cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """`definition` is a JSON schema as JSON text, a regular expression, or a grammar in Lark's notation."""

    kind: Literal["json_schema", "regex", "lark"]
    definition: str


class Grammars:
    """Compiles grammars for one tokenizer; may be called from any thread. `vocab_size` is the model's."""

    def __init__(self, tokenizer: ChatTokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._binding: Any = None  # llguidance's view of the tokenizer: a second of work, made when first asked for
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    def start(self, grammar: Grammar) -> Matcher:
        """A matcher before the reply's first token. Raises GrammarError."""
        with self._lock:
            if grammar not in self._compiled:
                self._compiled[grammar] = self._compile(grammar)
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > MAX_KEPT:
                self._compiled.popitem(last=False)
            return Matcher(self._compiled[grammar].deep_copy(), self._vocab_size, self._tokenizer)

    def _compile(self, grammar: Grammar) -> Any:
        try:
            import llguidance
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise GrammarError(
                "replies that follow a grammar need the extra `grammar` (pip install medusa-on-ray[grammar])"
            ) from error
        if self._binding is None:
            if not self._tokenizer.eos_token_ids:
                raise GrammarError("this model has no end-of-text token, so a reply could not end where a grammar does")
            eos = sorted(self._tokenizer.eos_token_ids)
            self._binding = from_tokenizer(self._tokenizer.hf, n_vocab=self._vocab_size, eos_token=eos)
        try:
            source = _source(llguidance.LLMatcher, grammar)
        except ValueError as error:
            raise GrammarError(f"the {grammar.kind} cannot be used: {error}") from error
        matcher = llguidance.LLMatcher(self._binding, source, log_level=0)
        if matcher.is_error():
            raise GrammarError(f"the {grammar.kind} cannot be used: {_first_line(matcher.get_error())}")
        return matcher


class Matcher:
    """One reply's place in its grammar: after its tokens, whose count is `num_tokens`."""

    def __init__(self, matcher: Any, vocab_size: int, tokenizer: ChatTokenizer) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._ends = tokenizer.eos_token_ids
        # Padding and the like, which some tokenizers let stand for the end.
        self._never = sorted(tokenizer.special_token_ids - tokenizer.eos_token_ids)
        self.num_tokens = 0

    def advance(self, token_ids: Iterable[int]) -> None:
        """Takes the reply's next tokens, which were allowed."""
        for token_id in token_ids:
            self.num_tokens += 1
            if not self._matcher.consume_token(token_id):
                raise RuntimeError(f"token {token_id} is none that the grammar allowed: {self._matcher.get_error()}")

    def allowed(self, token_ids: Sequence[int], parents: Sequence[int]) -> torch.Tensor:
        """Which tokens may follow each node of a tree, [N, V]. Node 0 is the reply's last token, which the matcher has
        taken. All may follow a node that no reply can reach: its own token is not allowed."""
        children: list[list[int]] = [[] for _ in token_ids]
        for node, parent in enumerate(parents[1:], start=1):
            children[parent].append(node)
        allowed_NV = torch.ones(len(token_ids), self._vocab_size, dtype=torch.bool)
        self._walk(0, token_ids, children, allowed_NV)
        return allowed_NV

    def _walk(self, node: int, token_ids: Sequence[int], children: list[list[int]], allowed_NV: torch.Tensor) -> None:
        allowed_NV[node] = self._next()
        for child in children[node]:
            token_id = token_ids[child]
            if not allowed_NV[node, token_id] or token_id in self._ends:
                continue
            self._matcher.consume_token(token_id)
            self._walk(child, token_ids, children, allowed_NV)
            self._matcher.rollback(1)

    def _next(self) -> torch.Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed_V = np.unpackbits(bits, bitorder="little", count=self._vocab_size).astype(bool)
        allowed_V[self._never] = False
        return torch.from_numpy(allowed_V)


def _source(compiler: Any, grammar: Grammar) -> str:
    if grammar.kind == "json_schema":
        return compiler.grammar_from_json_schema(grammar.definition, defaults=_JSON_OPTIONS)
    if grammar.kind == "regex":
        return compiler.grammar_from_regex(grammar.definition)
    return compiler.grammar_from_lark(grammar.definition)


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0] if message.strip() else "it is too complex"
