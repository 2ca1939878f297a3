"""Secrets are hidden by the name of their variable, by their form, and in URLs; ordinary text is left alone."""

from __future__ import annotations

import pytest

from soar.files import HIDDEN, scrub, secret_values

ENVIRONMENT = {
    "HF_TOKEN": "not-by-form-1",
    "WANDB_API_KEY": "0123456789abcdef",
    "MY_PASSWORD": "correct horse battery",
    "SECRET": "s3cr3t-s3cr3t",
    "LONGER_SECRET": "s3cr3t-s3cr3t-and-more",
    "SHORT_KEY": "on",
    "KEYBOARD": "qwertyuiop",
    "PATH": "/usr/bin:/usr/local/bin",
}


def test_which_variables_are_secret() -> None:
    found = secret_values(ENVIRONMENT)
    assert set(found) == {
        ENVIRONMENT[name] for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_PASSWORD", "SECRET", "LONGER_SECRET")
    }
    assert found.index("s3cr3t-s3cr3t-and-more") < found.index("s3cr3t-s3cr3t")


def test_values_are_hidden_at_any_depth() -> None:
    value = {"command": ["soar", "--set", "x=not-by-form-1"], "deep": ({"k": "a s3cr3t-s3cr3t-and-more b"}, 3, None)}
    wanted = {"command": ["soar", "--set", f"x={HIDDEN}"], "deep": ({"k": f"a {HIDDEN} b"}, 3, None)}
    assert scrub(value, ENVIRONMENT) == wanted


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


def test_the_environment_of_this_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "only-in-this-test")
    assert scrub("see only-in-this-test") == f"see {HIDDEN}"
