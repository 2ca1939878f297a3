"""Secrets out of what is written or shown: values of secret environment variables, tokens by their form, passwords in URLs.

Left out: secrets that stand in problem files or in a model's text, which are data.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

HIDDEN = "[hidden]"
SECRET_NAME = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PAT|CREDENTIALS?|AUTH)($|_)", re.IGNORECASE)
SHORTEST = 8  # a shorter value could be an ordinary word, and hiding it would garble what is shown
BY_FORM = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{20,}|\bsk-[\w-]{16,}|\bAKIA[A-Z0-9]{12,}"
)
IN_URL = re.compile(r"(?<=://)[^\s/@:]+:[^\s/@]+(?=@)")


def secret_values(environment: Mapping[str, str] | None = None) -> list[str]:
    """Values of the environment variables whose names speak of a secret, the longest first."""
    variables = os.environ if environment is None else environment
    found = {value for name, value in variables.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)


def scrub(value: T, environment: Mapping[str, str] | None = None) -> T:
    """The value with every secret in its texts replaced by `[hidden]`, at any depth of lists and dicts."""
    return _scrub(value, secret_values(environment))


def _scrub(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        return IN_URL.sub(HIDDEN, BY_FORM.sub(HIDDEN, value))
    if isinstance(value, dict):
        return {key: _scrub(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_scrub(item, secrets) for item in value)
    return value
