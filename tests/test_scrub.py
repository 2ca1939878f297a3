"""Secrets are hidden by the name of their variable, by their form, and in URLs; ordinary text is left alone."""

import re
from pathlib import Path

import pytest

from soar.files import HIDDEN, scrub

VALUE = "correct-horse 42 battery"  # no form gives it away
VARIABLES = """HF_TOKEN HUGGING_FACE_HUB_TOKEN HF_TOKEN_READ WANDB_API_KEY OPENAI_APIKEY AWS_SECRET_ACCESS_KEY DB_PASS
AWS_SESSION_TOKEN AZURE_CLIENT_SECRET GITHUB_PAT PGPASSWORD MYSQL_PWD DB_PASSWORD SMTP_PASSWD REDIS_AUTH SSH_PASSPHRASE
GOOGLE_APPLICATION_CREDENTIALS SECRET MY_PRIVATEKEY NPM_CONFIG__AUTHTOKEN SENTRY_DSN hf_token"""
ORDINARY = "KEYBOARD PATH TOKENIZERS_PARALLELISM COMPASS MONKEY AUTHOR KEYS_PER_PAGE PASSENGERS PWD OLDPWD"

FORMS = [  # "{a1B2*9}" stands for a text nine times over: no secret stands in this repository
    re.sub(r"\{([^{}*]+)\*(\d+)\}", lambda part: part[1] * int(part[2]), line).replace("\\n", "\n").split("\t")
    for line in (Path(__file__).parent / "cases" / "secrets.tsv").read_text("utf-8").splitlines()
]


@pytest.mark.parametrize("name", VARIABLES.split())
def test_secrets_by_the_name_of_their_variable_at_any_depth(name):
    value = {"command": ["soar", f"a {VALUE} b"], "deep": ({"k": f"{VALUE}-and-more"}, 3)}
    hidden = {"command": ["soar", f"a {HIDDEN} b"], "deep": [{"k": HIDDEN}, 3]}
    assert scrub(value, {name: VALUE, f"MY_{name}": f"{VALUE}-and-more"}) == hidden


@pytest.mark.parametrize("name", ORDINARY.split())
def test_values_of_other_variables_stay(name):
    assert scrub(VALUE, {name: VALUE, "SHORT_KEY": "on"}) == VALUE


@pytest.mark.parametrize(("text", "shown"), FORMS)
def test_secrets_by_their_form(text, shown):
    assert scrub(text, {}) == shown


def test_ordinary_text_stays():
    text = (
        """hf_config and sk-learn, https://host:80/a, ann@host:x, task-force-of-nineteen-people, is 3 > 2? yes #1
    world:tiny, Qwen/Qwen2.5-0.5B-Instruct, C:\\data\\x.jsonl, https://huggingface.co/datasets/a/b/resolve/main/x.jsonl
    token: end_of_the_text and max_tokens=123456789012345678, secret = problems.answer_column, sha256 """
        + "0a1b" * 16
    )
    assert scrub(text, {}) == text
