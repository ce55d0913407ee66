"""Which conversations training never sees: decided by their id alone, so that every step agrees without a list."""

from __future__ import annotations

import hashlib


def is_held_back(conversation_id: str, fraction: float, salt: str = "validation") -> bool:
    """True for about `fraction` of all ids, always the same ones; a larger fraction only adds to them."""
    digest = hashlib.sha256(f"{salt} {conversation_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
