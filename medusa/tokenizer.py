"""Text to token ids and back: chat templates, continued conversations, text that arrives token by token."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import cached_file

_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no UTF-8 (yet)
_REPLY_MARK = "MEDUSAREPLYMARK"  # stands for a reply while the template is asked what follows one


class ChatTemplateError(ValueError):
    """The tokenizer has no chat template, or its template refuses these messages."""


class ChatTokenizer:
    """A Hugging Face fast tokenizer as the engine needs it: one prompt is one list of token ids."""

    def __init__(self, hf: Any, *, eos_token_ids: Iterable[int] = (), definition: str | None = None) -> None:
        """`eos_token_ids` join the tokenizer's own; `definition` is the text of tokenizer.json, if any."""
        if not getattr(hf, "is_fast", False):
            raise ValueError(
                f"{type(hf).__name__} is no fast tokenizer: save one with a tokenizer.json beside the model"
            )
        self.hf = hf
        own = [] if hf.eos_token_id is None else [hf.eos_token_id]
        self.eos_token_ids: frozenset[int] = frozenset([*own, *eos_token_ids])
        self.vocab_size: int = len(hf)
        self._definition = definition
        # Transformers' decode spends more on what its argument may be than on decoding; a class with its own keeps it.
        has_own = any(getattr(type(hf), n) is not getattr(PreTrainedTokenizerFast, n) for n in ("decode", "_decode"))
        self._backend = None if has_own else hf.backend_tokenizer

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ChatTokenizer:
        hf = AutoTokenizer.from_pretrained(str(path))
        file = cached_file(str(path), "tokenizer.json", _raise_exceptions_for_missing_entries=False)
        definition = Path(file).read_text(encoding="utf-8") if file else None
        return cls(hf, eos_token_ids=_generation_eos(path), definition=definition)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """A plain completion prompt, with the special tokens that the tokenizer puts around a text."""
        return list(self.hf.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
        tools: Sequence[Any] | None = None,
        **template_arguments: Any,
    ) -> list[int]:
        """The conversation as its template renders it; most templates write their own BOS, so none is added."""
        text = self.render_chat(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **template_arguments
        )
        return self.encode(text, add_special_tokens=add_special_tokens)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **arguments: Any
    ) -> str:
        """The text that the chat template makes of the conversation."""
        if not self.hf.chat_template:
            name = Path(self.hf.name_or_path).name or "this model"  # answers carry this text: no path of the machine
            raise ChatTemplateError(
                f"the tokenizer of {name} has no chat template: put a chat_template.jinja beside its "
                "tokenizer.json, or send a plain completion prompt"
            )
        try:
            text: str = self.hf.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **arguments,
            )
        except (jinja2.TemplateError, TypeError, ArithmeticError) as error:  # the last two by a value it cannot use
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error
        return text

    def can_fit(self, text: str, num_tokens: int) -> bool:
        """False where `text` has more characters than so many tokens can stand for, which its length alone tells."""
        if len(text) <= num_tokens or self._longest_token is None:
            return True
        most = num_tokens * self._longest_token
        return len(text) <= most or len(unicodedata.normalize("NFC", text)) <= most

    def next_turn(self, conversation_ids: Sequence[int], user_message: str) -> list[int]:
        """The prompt of the next turn: the conversation's own ids, untouched, and what follows a reply.

        `conversation_ids` are the last prompt's ids and the reply's. What the template puts after a reply
        (its end-of-turn token unless the reply already has it, the user's turn, the generation prompt) is
        tokenised by itself, so the reply keeps the ids that the model wrote and their cache stays valid.
        """
        exchange = [
            {"role": "user", "content": "user"},
            {"role": "assistant", "content": _REPLY_MARK},
            {"role": "user", "content": user_message},
        ]
        _, mark, after = self.render_chat(exchange).partition(_REPLY_MARK)
        if not mark:
            raise ChatTemplateError(
                "the chat template does not write a reply as it is, so a conversation cannot be continued by "
                "token ids: encode the whole conversation with encode_chat instead"
            )
        last = conversation_ids[-1] if conversation_ids else None
        if last not in self.eos_token_ids:
            return [*conversation_ids, *self.encode(after, add_special_tokens=False)]
        end = self.hf.convert_ids_to_tokens(last)
        if after.lstrip(" ").startswith(end):
            after = after.lstrip(" ").removeprefix(end)
        # Tokenised behind the token it follows: some tokenizers put a space before the start of a text.
        return [*conversation_ids, *self.encode(end + after, add_special_tokens=False)[1:]]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        if self._backend is not None:
            text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
            return text
        return str(
            self.hf.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental decoder, for one sequence."""
        return Detokenizer(self, skip_special_tokens)

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out when it skips special tokens."""
        added = self.hf.added_tokens_decoder
        return frozenset(index for index, token in added.items() if token.special)

    @cached_property
    def _longest_token(self) -> int | None:
        """In characters; None where one token may stand for any number of them: unknown words, characters that are
        dropped, spaces beside a special token."""
        definition = json.loads(self._definition or self.hf.backend_tokenizer.to_str())
        vocab = self.hf.get_vocab()
        parts = (definition["normalizer"], definition["pre_tokenizer"])
        is_byte_level = '"ByteLevel"' in json.dumps(definition["pre_tokenizer"])
        each_byte = ByteLevel.alphabet() if is_byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        knows_all = definition["model"]["type"] in ("BPE", "Unigram") and all(token in vocab for token in each_byte)
        strips = any(token["lstrip"] or token["rstrip"] for token in definition["added_tokens"])
        if not knows_all or strips or not all(_keeps_characters(part) for part in parts):
            return None
        return max(map(len, vocab))

    @cached_property
    def digest(self) -> str:
        """sha256 of what gives ids their meaning: vocabulary, merges, splitting rules and chat template.

        Left out: how ids become text, what `encode` adds around a text, and fields at their empty defaults;
        saving a tokenizer again, with another library version, changes those alone.
        """
        definition = json.loads(self._definition or self.hf.backend_tokenizer.to_str())
        meaning = {key: definition.get(key) for key in ("normalizer", "pre_tokenizer", "added_tokens")}
        model = {key: value for key, value in definition["model"].items() if value not in (None, False)}
        if "merges" in model:  # "a b" in older files, ["a", "b"] in newer ones
            model["merges"] = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        text = json.dumps([meaning, model, self.hf.chat_template], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Detokenizer:
    """One sequence's text as its tokens arrive: `"".join(pushes) + finish()` is the decoded whole.

    Only a short window of the last tokens is decoded at a time, so the cost does not grow with the text.
    Text that ends in U+FFFD may be the first bytes of a character, so that end is held back until more
    tokens settle it. One exception to the equality: under SentencePiece's byte fallback a malformed byte
    turns the whole run of bytes around it into U+FFFD, and characters of that run already given stay.
    """

    _KEEP = 8  # tokens kept as context when the window moves on
    _MOVE = 24  # a window of this many tokens moves on at the next whole character
    _LIMIT = 64  # bytes that make no character for so long never will: they are let go as U+FFFD

    def __init__(self, tokenizer: ChatTokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._given = 0  # characters of the window's text already returned

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids` settle: never part of a character, possibly empty."""
        self._window += [token for token in token_ids if token not in self._skipped]
        end, text = self._settle()
        delta = text[self._given :]
        self._given = max(self._given, len(text))
        if len(self._window) > self._MOVE:
            self._move_on(end, text)
        return delta

    def finish(self) -> str:
        """What was held back, as it stands; the detokenizer is then empty."""
        rest = self._decode(self._window)[self._given :]
        self._window, self._given = [], 0
        return rest

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _settle(self) -> tuple[int, str]:
        """The start of the window that ends in a whole character: how many tokens, and their text."""
        tokens, whole = len(self._window), self._decode(self._window)
        if not whole.endswith(_REPLACEMENT):
            return tokens, whole
        for end in range(tokens - 1, max(tokens - 4, 0) - 1, -1):  # a character has 4 bytes at most
            text = self._decode(self._window[:end])
            if not text.endswith(_REPLACEMENT):
                return end, text
        if tokens > self._LIMIT:
            return tokens, whole[:-1]  # the last one may still be the start of a character
        return tokens, whole.rstrip(_REPLACEMENT)

    def _move_on(self, end: int, text: str) -> None:
        """Drops old tokens, where those before `end` decode by themselves to the end of the same text."""
        for keep in range(self._KEEP, self._KEEP - 4, -1):  # one of 4 bytes in a row begins a character
            tail = self._decode(self._window[end - keep : end])
            if tail and not tail.endswith(_REPLACEMENT) and text.endswith(tail):
                self._window, self._given = self._window[end - keep :], len(tail)
                return
        if len(self._window) > self._LIMIT:
            pending = len(self._decode(self._window)) - self._given
            self._window = self._window[-self._KEEP :]
            self._given = max(len(self._decode(self._window)) - pending, 0)


def _keeps_characters(part: Mapping[str, Any] | None) -> bool:
    """Whether a normaliser or pre-tokeniser of a tokenizer.json gives back no fewer characters, but for NFC's."""
    if part is None:
        return True
    match part["type"]:
        case "Sequence":
            return all(_keeps_characters(each) for each in part.get("normalizers") or part.get("pretokenizers") or ())
        case "Replace":
            pattern = part["pattern"].get("String")
            return pattern is not None and len(part["content"]) >= len(pattern)
        case "Split":
            return part["behavior"] != "Removed"
        case kind:
            return kind in ("NFC", "Prepend", "ByteLevel", "Metaspace", "Digits")


def _generation_eos(path: str | Path) -> list[int]:
    """The ids that end a reply by the model's generation_config.json: chat models often name several."""
    try:
        eos = GenerationConfig.from_pretrained(str(path)).eos_token_id
    except OSError:  # the file is optional
        return []
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)
