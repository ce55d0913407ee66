"""The text and bytes of single tokens, which log-probabilities are told by."""

from __future__ import annotations

import re
from typing import Any


class TokenTexts:
    """The text and bytes of single tokens, for logprobs; `hf` is the Hugging Face tokenizer."""

    def __init__(self, hf: Any) -> None:
        self._hf = hf
        self._is_byte_level = hf.convert_tokens_to_string(["Ġ"]) == " "
        self._added = set(hf.get_added_vocab().values())

    def to_bytes(self, token_id: int) -> bytes:
        token = self._hf.convert_ids_to_tokens(token_id)
        if token is None:  # models pad their vocabulary beyond the tokenizer's
            return b""
        if token_id in self._added:
            return token.encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF[character] for character in token)
        if fallback := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(fallback[1])
        return token.replace("▁", " ").encode()

    def to_text(self, token_id: int) -> str:
        """Half a character is shown as OpenAI shows it, such as `bytes:\\xe2\\x80`."""
        raw = self.to_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others for the characters from 256 on."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()
