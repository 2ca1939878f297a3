"""Secrets are hidden by the name of their variable, by their form, and in URLs; ordinary text is left alone."""

from __future__ import annotations

import pytest

from soar.files import HIDDEN, scrub

SECRETS = {
    "HF_TOKEN": "not-by-form-1",
    "WANDB_API_KEY": "0123456789abcdef",
    "MY_PASSWORD": "correct horse battery",
    "SECRET": "s3cr3t-s3cr3t",
    "LONGER_SECRET": "s3cr3t-s3cr3t-and-more",
}
OTHERS = {"SHORT_KEY": "on", "KEYBOARD": "qwertyuiop", "PATH": "/usr/bin:/usr/local/bin"}


def test_values_of_secret_variables_are_hidden_at_any_depth() -> None:
    value = {"command": ["soar", *SECRETS.values(), *OTHERS.values()], "deep": ({"k": "a s3cr3t-s3cr3t-and-more b"}, 3)}
    hidden = {"command": ["soar", *[HIDDEN] * 5, *OTHERS.values()], "deep": ({"k": f"a {HIDDEN} b"}, 3)}
    assert scrub(value, SECRETS | OTHERS) == hidden


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("token hf_" + "a1B2" * 5 + " end", f"token {HIDDEN} end"),
        ("ghp_" + "x" * 36, HIDDEN),
        ("github_pat_" + "x_1" * 10, HIDDEN),
        ("sk-" + "proj-" + "a" * 20, HIDDEN),
        ("AKIA" + "ABCDEFGH12345678", HIDDEN),
        ("https://ann:pass@host/x.jsonl", f"https://{HIDDEN}@host/x.jsonl"),
        ("hf_config and sk-learn, https://host:80/a@b, ann@host:x", None),
        ("world:tiny, Qwen/Qwen2.5-0.5B-Instruct, C:\\data\\x.jsonl", None),
    ],
)
def test_secrets_by_their_form(text: str, shown: str | None) -> None:
    assert scrub(text, {}) == (text if shown is None else shown)
