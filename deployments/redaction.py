"""The default redaction hook: masks what is a person's or a secret by its form alone.

It knows forms, not meanings: names, addresses and what people tell about themselves pass. Where prompts hold such
things, name your own function in `redact` (`module:name`: text in, text or None out).
"""

from __future__ import annotations

import re

_FORMS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("[email]", re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b")),
    ("[key]", re.compile(r"\b(?:sk|pk|ghp|gho|xox[abp]|hf|AKIA)[-_]?[A-Za-z0-9_-]{16,}\b")),
    ("[key]", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)),
    ("[key]", re.compile(r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+")),  # a JSON web token
    ("[iban]", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b")),
    ("[address]", re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b")),
    ("[number]", re.compile(r"(?<!\w)\+?\d(?:[ ()/.-]{0,2}\d){8,}(?!\w)")),  # telephone, card
)


def mask(text: str) -> str:
    """The text with e-mail and network addresses, keys, account, card and telephone numbers replaced by their kind."""
    for name, form in _FORMS:
        text = form.sub(name, text)
    return text
