"""One row of a prompt source as a conversation of the user's turns: a small function for each shape that rows have.

    {"messages": [{"role": "user", "content": "..."}, ...]}         OpenAI's, UltraChat 200k's; also "conversation"
    {"conversations": [{"from": "human", "value": "..."}, ...]}      ShareGPT's
    {"body": {"messages": [...]}, "custom_id": "..."}                OpenAI's batch requests
    {"turns": ["...", "..."]}                                        MT-bench's
    {"data": ["question", "answer", ...]}                            UltraChat's first release
    {"instruction": "...", "input": "..."}                           AlpacaEval's and Alpaca's
    {"prompt": "..."}                                                plain

Each with or without an id, "system" and a category. Replies in the source are left out: the model answers each turn
itself. A row without an id gets a hash of its content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "developer": "system",
}
ID_KEYS = ("id", "prompt_id", "question_id", "custom_id", "conversation_id")
CATEGORY_KEYS = ("category", "source", "dataset")
EXAMPLE = '{"messages": [{"role": "user", "content": "Hello"}]}'
Conversation = tuple[str | None, list[str]]  # the system message and the user's turns


class RowError(ValueError):
    """This row alone cannot be used; the message is the reason it is kept aside with."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation to be answered: the user's turns in order."""

    id: str
    turns: tuple[str, ...]
    system: str | None = None
    category: str | None = None

    @property
    def content_hash(self) -> str:
        """Of what the model is asked: the same for equal questions, whatever their id and category."""
        content = json.dumps([self.system, self.turns], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:20]


def normalise(row: Any) -> Prompt:
    """One row of any known shape as a Prompt; RowError tells why it is none."""
    if not isinstance(row, dict):
        raise RowError(f"a row is an object such as {EXAMPLE}, got {type(row).__name__}")
    system, turns = _conversation(row)
    if not turns:
        raise RowError("no user turn; at least one message with role user is needed")
    for number, turn in enumerate(turns, start=1):
        if not turn.strip():
            raise RowError(f"user turn {number} is empty")
    category = _first(row, CATEGORY_KEYS)
    prompt = Prompt(_identity(_first(row, ID_KEYS)), tuple(turns), system, None if category is None else str(category))
    for text in (prompt.id, *prompt.turns, system or "", prompt.category or ""):
        if not _encodable(text):
            raise RowError("the text holds half of a surrogate pair, which no tokenizer can read")
    return prompt if prompt.id else replace(prompt, id=prompt.content_hash)


def _conversation(row: dict[str, Any]) -> Conversation:
    """By the first of SHAPES whose key is there: a row may carry the first turn once more as "prompt"."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise RowError(f"system must be text, got {type(system).__name__}")
    for key, read in SHAPES.items():
        if row.get(key) is not None:
            return read(system, row[key], row)
    raise RowError(f"none of {', '.join(SHAPES)} is there; the keys are {sorted(map(str, row))}")


def _messages(system: str | None, value: Any, _: dict[str, Any]) -> Conversation:
    turns: list[str] = []
    for position, message in enumerate(_list(value, "messages")):
        if not isinstance(message, dict):
            raise RowError(f"message {position + 1} is {type(message).__name__}, not an object with role and content")
        role = message.get("role", message.get("from"))
        role = ROLES.get(role, role) if isinstance(role, str) else role
        content = message.get("content", message.get("value"))
        if role == "user":
            turns.append(_text(content))
        elif role == "system" and position == 0 and system is None:
            system = _text(content)
        elif role != "assistant":
            raise RowError(f"message {position + 1} has role {role!r}; allowed are system (first), user, assistant")
    return system, turns


def _batch_request(system: str | None, body: Any, row: dict[str, Any]) -> Conversation:
    if not isinstance(body, dict) or body.get("messages") is None:
        raise RowError("body must hold messages: only requests to /v1/chat/completions are prompts")
    return _messages(system, body["messages"], row)


def _turns(system: str | None, turns: Any, _: dict[str, Any]) -> Conversation:
    return system, [_text(turn) for turn in _list(turns, "turns")]


def _alternating(system: str | None, texts: Any, _: dict[str, Any]) -> Conversation:
    return system, [_text(text) for text in _list(texts, "data")[::2]]


def _instruction(system: str | None, instruction: Any, row: dict[str, Any]) -> Conversation:
    given = row.get("input")
    text = _text(instruction)
    return system, [text if given in (None, "") else f"{text}\n\n{_text(given)}"]


def _prompt(system: str | None, prompt: Any, row: dict[str, Any]) -> Conversation:
    """OpenAI's messages stand under "prompt" in some preference sets."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict) and "role" in prompt[0]:
        return _messages(system, prompt, row)
    return system, [_text(prompt)]


SHAPES: dict[str, Callable[[str | None, Any, dict[str, Any]], Conversation]] = {
    "messages": _messages,
    "conversations": _messages,
    "conversation": _messages,
    "body": _batch_request,
    "turns": _turns,
    "data": _alternating,
    "instruction": _instruction,
    "prompt": _prompt,
}


def _text(content: Any) -> str:
    """The text of a message: a string, or OpenAI's list of text parts."""
    if isinstance(content, list) and content:
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) == len(content) and all(isinstance(part, str) for part in parts):
            return "".join(parts)
    if not isinstance(content, str):
        raise RowError(f"content must be text, got {type(content).__name__}")
    return content


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(f"{name} must be a list, got {type(value).__name__}")
    return value


def _first(row: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _identity(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(f"id must be text or an integer, got {value!r}")
    return str(value)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
