"""Keeps secrets out of everything that a run writes about itself."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from urllib.parse import quote

_NAMES = ("KEY", "TOKEN", "PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "CREDENTIALS")
# What secrets look like: Hugging Face tokens, user:password@host (or one of the two), what HTTP sends.
_PATTERNS = (r"\bhf_[A-Za-z0-9]{8,}", r"(?<=://)[^/\s]+(?=@)", r"(?i)(?<=bearer )[\w.-]{8,}")


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """`text` without secrets that the environment holds, as they are or as messages quote them, and without what looks
    like one.
    """
    secrets = {value.strip() for name, value in environ.items() if name.upper().endswith(_NAMES)}
    forms = {
        form
        for secret in secrets
        if len(secret) >= 6
        for form in (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], _in_url(secret, ""), _in_url(secret, "/"))
    }
    for form in sorted(forms, key=len, reverse=True):  # one may be the beginning of another
        text = text.replace(form, "***")
    for pattern in _PATTERNS:
        text = re.sub(pattern, "***", text)
    return text


def _in_url(text: str, safe: str) -> str:
    return quote(text, safe=safe, errors="surrogateescape")  # what is no UTF-8 in the environment
