"""Bearer keys: the service knows their hashes alone, and compares in constant time.

A key's hash is the hex sha256 of its text; `medusa serve --new-api-key` draws a key and prints both.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from hmac import compare_digest
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.errors import ApiError
from medusa.config import ConfigError

# What tells nothing about prompts and costs no decoding: probes, scrapers, the page (which asks for a key itself).
OPEN_PATHS = frozenset({"/", "/health", "/metrics", "/version", "/openapi.json"})
_HASH = re.compile(r"[0-9a-f]{64}")


def new_key() -> str:
    return f"sk-medusa-{secrets.token_urlsafe(32)}"


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_hashes(path: Path) -> tuple[str, ...]:
    """The hashes of a file: one a line; empty lines and those that begin with # are skipped. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file {path} cannot be read: {error}") from error
    hashes = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not hashes:
        raise ConfigError(f"api_key_file {path} holds no hash; without one nobody could be let in")
    check_hashes(hashes, f"api_key_file {path}")
    return hashes


def check_hashes(hashes: Iterable[str], source: str) -> None:
    """Raises ConfigError for what is no hash, without repeating it: it may be a key in plain text."""
    for number, value in enumerate(hashes, start=1):
        if not _HASH.fullmatch(value):
            raise ConfigError(f"{source}: entry {number} is no hex sha256 (64 of 0-9a-f); store hashes, not keys")


class Authenticate:
    """401 for a request without one of the keys, except on OPEN_PATHS; lets all pass where there are no hashes."""

    def __init__(self, app: ASGIApp, *, hashes: Iterable[str]) -> None:
        self._app = app
        self._hashes = tuple(value.encode() for value in hashes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._hashes or scope["path"] in OPEN_PATHS or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
        message = "No valid key; send the header Authorization: Bearer KEY."
        await ApiError(401, message, headers=headers).response()(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = hash_of(key.strip()).encode()
        matches = [compare_digest(given, known) for known in self._hashes]  # all of them, whichever matches
        return scheme.lower() == "bearer" and any(matches)
