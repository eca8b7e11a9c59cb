"""Secrets, recognized by their value, left out of everything that is recorded or printed; control characters.

A secret is recognized by its form (a password in an address, a signed query, a bearer token), or because it equals the
value of an environment variable whose name suggests a secret. docs/security.md has the limits.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that would end a line, drive a terminal, or cannot be written in UTF-8."""
HIDDEN = "***"
SHORTEST = 8
"""Fewest characters of a variable's value that counts as a secret; shorter values occur in any text."""

_VARIABLE = re.compile("KEY|PASS|_PWD|SECRET|TOKEN|CREDENTIAL|JWT|AUTH|COOKIE|SIGNATURE|BEARER", re.IGNORECASE)
# Names that hold a secret in a query, and those that do in any text, where `key = value` is a setting.
_IN_QUERY = re.compile("key|pass|pwd|secret|token|cred|sig|auth|jwt", re.IGNORECASE)
_ANYWHERE = re.compile(
    r"(?:^|[_.-])(?:pass|password|passwd|passphrase|pwd|secret|token|credentials?|sig|signature|auth|authorization|jwt"
    r"|cookie)$|[_-]key$|(?:api|access|secret|private)key(?:id)?$",
    re.IGNORECASE,
)
# Every quantifier is possessive or bounded, and no two that follow each other match the same character: the time is
# linear in the text, which may come from a server.
_ADDRESS = re.compile(
    # user@ and user:password@. A password may hold a slash; a port, and what follows an IPv6 address, is none.
    r"""(?<=://)(?:[^/?#\s@"']{0,256}|[^/?#\s:@\["']{0,256}:(?!\d{1,5}(?:[/?#]|$))[^\s"']{0,256})@"""
)
_ENTRY = re.compile(
    r"""(?P<query>[?&;])?+(?<![\w.%-])(?P<name>[\w.%-]++)(?:["']\s{0,9}+[=:]\s{0,9}+|\s{0,9}+=\s{0,9}+)"""
)
_VALUE = re.compile(r"""(?:"[^"]*+"|'[^']*+'|[^\s"',;&)}\]]++)""")
_QUERY_VALUE = re.compile(r"""[^&;\s'"#]++""")
_LONG = re.compile(r"""[A-Za-z0-9+/_%=-]{32,}+(?=$|[&;\s'"#])""")
_FORMS = tuple(
    re.compile(form)
    for form in (
        r"(?i:(?:(?<=authorization:)|(?<=authorization=))\s{0,9}+(?:[a-z]++\s++)?+[^\s\"',]++)",
        r"(?i:\bbearer\s{1,9}+[\w.~+/=-]{8,}+)",
        # tokens that say what they are: Hugging Face, GitHub, GitLab, OpenAI, AWS, Google, Slack, JSON web tokens, keys
        r"(?<![\w-])(?:hf_[A-Za-z0-9]{16,}+|gh[pousr]_[A-Za-z0-9]{20,}+|github_pat_\w{20,}+|glpat-[\w-]{16,}+)",
        r"(?<![\w-])(?:sk-[\w-]{20,}+|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{30,}+|xox[abprs]-[\w-]{10,}+)",
        r"(?<![\w-])eyJ[\w-]++\.[\w-]++\.[\w-]*+",
        r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[^-]*+(?:-----END [A-Z ]{0,40}-----)?",
    )
)


def redact(text: str) -> str:
    """Return the text with every secret that is recognized replaced by `HIDDEN`."""
    for secret in _known_secrets():  # first, since a form may hide a part of one and leave the rest
        text = text.replace(secret, HIDDEN)
    text = _ADDRESS.sub(f"{HIDDEN}@", text)
    for form in _FORMS:
        text = form.sub(HIDDEN, text)
    return _without_values(text)


def redact_all(content: Any) -> Any:
    """Return nested lists and tables with every text in them redacted, keys included."""
    if isinstance(content, str):
        return redact(content)
    if isinstance(content, dict):
        return {redact_all(key): redact_all(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [redact_all(value) for value in content]
    return content


def _without_values(text: str) -> str:
    """Return the text without the values whose names suggest a secret, and without the long values of queries."""
    parts, done = [], 0  # the text before `done` is in `parts`
    for entry in _ENTRY.finditer(text):
        start = entry.end()
        if entry["query"]:
            secret = _IN_QUERY.search(entry["name"]) or _LONG.match(text, start)
        else:
            secret = _ANYWHERE.search(entry["name"])
        # An entry that begins before `done` lies in a value that is hidden.
        value = (_QUERY_VALUE if entry["query"] else _VALUE).match(text, start) if secret and start > done else None
        if value:
            parts += [text[done:start], HIDDEN]
            done = value.end()
    return "".join(parts) + text[done:]


def _known_secrets() -> list[str]:
    """Return the values of the variables whose names suggest a secret, as they are and as quoted; longest first.

    A path is no secret: SSH_AUTH_SOCK and the like name files.
    """
    found = set[str]()
    for name, value in os.environ.items():
        if _VARIABLE.search(name) and len(value) >= SHORTEST and not _is_path(value):
            found |= {value, repr(value)[1:-1], json.dumps(value)[1:-1]}
    return sorted(found, key=len, reverse=True)  # one may be part of another


def _is_path(value: str) -> bool:
    try:
        return Path(value).exists()
    except (OSError, ValueError):
        return False
