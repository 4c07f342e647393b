"""Keeps secrets out of everything that a run writes about itself."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import quote

# Variables that hold a secret: one of these words ends the name, but for a plural and a number (OPENAI_API_KEYS_2).
_SECRET_NAME = re.compile(
    r"(?:(?<!MON)KEY|TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIAL|WEBHOOK|(?<!COM)(?<!BY)PASS|(?:^|_)(?:PWD|AUTH|PAT|CRED|COOKIE|DSN))"
    r"S?(?:_?[0-9]+)?$"
)
# Elsewhere in the name the word may describe something else (AUTH_METHOD, KEY_BINDINGS, TOKENIZERS_PARALLELISM): then
# the value decides.
_PERHAPS_SECRET_NAME = re.compile(
    r"(?:^|_)(?:KEY|PASS|PWD|AUTH|PAT|CRED)S?(?:_|$)|APIKEY|TOKEN(?!IZ)|PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIAL|WEBHOOK"
)
_NOT_SECRETS = {"PWD", "OLDPWD"}
_ORDINARY = {"enabled", "disabled", "default", "required", "optional", "unlimited"}
_PATH = re.compile(r"(?:~|\.{0,2})(?:/[\w.+-]+){2,}/?|[A-Za-z]:\\.*")
_MIXED = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])\S{12,}|\S*[a-z]\S*[A-Z]\S*[0-9]\S*")

# What secrets look like, whoever holds them. A group named `kept` stays.
_PATTERNS = tuple(
    map(
        re.compile,
        (
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
            r"(?<=://)[^/\s]+(?=@)",  # user:password@host, or one of the two
            r"\bhf_[A-Za-z0-9]{8,}",
            r"\bgh[pousr]_[A-Za-z0-9]{8,}",
            r"\bgithub_pat_\w{8,}",
            r"\bglpat-[\w-]{8,}",
            r"(?<![\w-])[sr]k[-_](?=[\w-]*[0-9])[\w-]{16,}",  # OpenAI, Anthropic, Stripe
            r"\bxox[abeoprs]-[\w-]{8,}",
            r"\b(?:AKIA|ASIA)[0-9A-Z]{12,}",
            r"\bAIza[\w-]{20,}",
            r"\beyJ[\w-]{8,}\.[\w-]{4,}(?:\.[\w-]*)?",  # JSON web tokens
            r"\b(?:npm_|pypi-|dop_v1_)(?=\w*[0-9])[\w-]{16,}",
            r"(?P<kept>hooks\.slack\.com/\w+/)[\w/]+",
            r"(?P<kept>(?i:\bbearer)\s+)[\w.~+/=-]{8,}",
            r"(?P<kept>(?i:\bbasic)\s+)(?=[A-Za-z]*(?:[0-9=+/]|[a-z][A-Z]))[A-Za-z0-9+/=]{8,}",
            r"(?P<kept>[?&](?i:[\w-]*(?:token|key|secret|password|sig|signature|auth))=)[^&\s#'\"]+",
            r"(?P<kept>\b(?i:password|passwd|pwd|secret|client_secret|api_?key|access_?token|account_?key"
            r"|shared_?access_?key)\s*=\s*)[^\s;&,'\"]{6,}",
        ),
    )
)


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """`text` without the secrets that the environment holds, as they are or as messages quote them, and without what
    looks like a secret.
    """
    forms = {
        form
        for secret in _secrets(environ)
        for form in (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], _in_url(secret, ""), _in_url(secret, "/"))
    }
    for form in sorted(forms, key=len, reverse=True):  # one may be the beginning of another
        text = text.replace(form, "***")
    for pattern in _PATTERNS:
        text = pattern.sub(lambda found: (found.groupdict().get("kept") or "") + "***", text)
    return text


def _secrets(environ: Mapping[str, str]) -> Iterator[str]:
    """Values of at least six characters, and their lines if there are several: messages may show one of them."""
    for name, value in environ.items():
        value = value.strip()
        if "PRIVATE KEY-----" not in value and not _is_secret(name.upper(), value):
            continue
        for part in {value, *value.splitlines()}:
            part = part.strip()
            if len(part) >= 6 and not re.fullmatch(r"-+(BEGIN|END) [A-Z ]+-+", part):
                yield part
    for value in environ.values():  # the password of a connection string may be shown alone
        if (found := re.search(r"://[^/\s:@]*:([^/\s]{6,})@", value)) is not None:
            yield found[1]


def _is_secret(name: str, value: str) -> bool:
    if name in _NOT_SECRETS or value.lower() in _ORDINARY or _PATH.fullmatch(value):
        return False
    if _SECRET_NAME.search(name):
        return True
    return _PERHAPS_SECRET_NAME.search(name) is not None and _MIXED.fullmatch(value) is not None


def _in_url(text: str, safe: str) -> str:
    return quote(text, safe=safe, errors="surrogateescape")  # what is no UTF-8 in the environment
