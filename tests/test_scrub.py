"""Secrets are hidden by the name of their variable, by their form, and in URLs; ordinary text is left alone."""

from __future__ import annotations

import pytest

from soar.files import HIDDEN, scrub

VALUE = "correct-horse 42 battery"  # no form gives it away
VARIABLES = """HF_TOKEN HUGGING_FACE_HUB_TOKEN HF_TOKEN_READ WANDB_API_KEY OPENAI_APIKEY AWS_SECRET_ACCESS_KEY DB_PASS
AWS_SESSION_TOKEN AZURE_CLIENT_SECRET GITHUB_PAT PGPASSWORD MYSQL_PWD DB_PASSWORD SMTP_PASSWD REDIS_AUTH SSH_PASSPHRASE
GOOGLE_APPLICATION_CREDENTIALS SECRET MY_PRIVATEKEY NPM_CONFIG__AUTHTOKEN SENTRY_DSN hf_token"""
ORDINARY = "KEYBOARD PATH TOKENIZERS_PARALLELISM COMPASS MONKEY AUTHOR KEYS_PER_PAGE PASSENGERS PWD OLDPWD"

FORMS = [
    ("token hf_" + "a1B2" * 5 + " end", f"token {HIDDEN} end"),
    ("ghp_" + "x" * 36, HIDDEN),
    ("github_pat_" + "x_1" * 10, HIDDEN),
    ("glpat-" + "x_1-" * 5, HIDDEN),
    ("sk-" + "proj-" + "a" * 20, HIDDEN),
    ("sk-ant-api03-" + "a_B" * 8, HIDDEN),
    ("npm_" + "a1B2" * 9, HIDDEN),
    ("pypi-AgEIcHlwaS5vcmc" + "a1B2" * 5, HIDDEN),
    ("xoxb-12345678901-abcdefghijk", HIDDEN),
    ("AIza" + "Sy_-" * 9, HIDDEN),
    ("AKIA" + "ABCDEFGH12345678", HIDDEN),
    ("Bearer " + "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.dBjftJeZ4CVP-mB92K", f"Bearer {HIDDEN}"),
    ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaA\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n", f"{HIDDEN}\n"),
    ("https://ann:pass@host/x.jsonl", f"https://{HIDDEN}@host/x.jsonl"),
    ("https://abcdefghijklmnop@host/x.jsonl", f"https://{HIDDEN}@host/x.jsonl"),
    ("--set problems.source=https://host/x.jsonl?api_key=k", f"--set problems.source=https://host/x.jsonl?{HIDDEN}"),
    ("https://host/x#access_token=k and more", f"https://host/x#{HIDDEN} and more"),
    ("https://me.blob.core.windows.net/c/x?sv=2024&sig=k%3D", f"https://me.blob.core.windows.net/c/x?{HIDDEN}"),
    ("s3://b/x?X-Amz-Signature=k", f"s3://b/x?{HIDDEN}"),
    *[
        (f"x {text} y", f"x {HIDDEN} y")
        for text in (
            "xapp-1-A01-" + "a1B2" * 9,
            "ASIA" + "ABCDEFGH12345678",
            "sk_live_" + "a1B2" * 6,
            "rk_live_" + "a1B2" * 6,
            "SG." + "a1B2_-" * 4 + "." + "a1B2" * 10,
            "hf_oauth_" + "a1B2" * 6,
            "123456789:AA" + "a1B2_" * 7,
            "MTIzNDU2Nzg5MDEyMzQ1Njc4.GabcdE." + "a1B2" * 9,
            "dckr_pat_" + "a1B2" * 6,
            "dop_v1_" + "0a1b" * 16,
            "r8_" + "a1B2" * 9,
            "dapi" + "0a1b" * 8,
            "gsk_" + "a1B2" * 12,
            "xai-" + "a1B2" * 12,
            "nvapi-" + "a1B2_-" * 10,
            "wandb_v1_" + "a1B2_" * 9,
            "ya29." + "a1B2_-" * 8,
            "glpat-" + "a1B2" * 5 + ".01.a1B2a1B2",
        )
    ],
    ("https://hooks.slack.com/services/T0/B0/k", f"https://hooks.slack.com/services/{HIDDEN}"),
    ("AccountName=x;AccountKey=" + "a1B2" * 9 + "==;b", f"AccountName=x;AccountKey={HIDDEN};b"),
    ("Authorization: Bearer " + "a1B2" * 9, f"Authorization: Bearer {HIDDEN}"),
    ("--token=" + "a1B2" * 6, f"--token={HIDDEN}"),
    ('{"api_key": "' + "a1B2" * 6 + '"}', '{"api_key": "' + HIDDEN + '"}'),
    ("postgresql://ann:p@ss/w@db:5432/x", f"postgresql://{HIDDEN}@ss/w@db:5432/x"),
]


@pytest.mark.parametrize("name", VARIABLES.split())
def test_secrets_by_the_name_of_their_variable_at_any_depth(name: str) -> None:
    value = {"command": ["soar", f"a {VALUE} b"], "deep": ({"k": f"{VALUE}-and-more"}, 3)}
    hidden = {"command": ["soar", f"a {HIDDEN} b"], "deep": [{"k": HIDDEN}, 3]}
    assert scrub(value, {name: VALUE, f"MY_{name}": f"{VALUE}-and-more"}) == hidden


@pytest.mark.parametrize("name", ORDINARY.split())
def test_values_of_other_variables_stay(name: str) -> None:
    assert scrub(VALUE, {name: VALUE, "SHORT_KEY": "on"}) == VALUE


@pytest.mark.parametrize(("text", "shown"), FORMS)
def test_secrets_by_their_form(text: str, shown: str) -> None:
    assert scrub(text, {}) == shown


@pytest.mark.parametrize(
    "text",
    [
        "hf_config and sk-learn, https://host:80/a, ann@host:x, task-force-of-nineteen-people",
        "world:tiny, Qwen/Qwen2.5-0.5B-Instruct, C:\\data\\x.jsonl, is 3 > 2? yes #1",
        "https://huggingface.co/datasets/a/b/resolve/main/x.jsonl",
        "token: end_of_the_text and max_tokens=123456789012345678, secret = problems.answer_column, sha256 "
        + "0a1b" * 16,
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert scrub(text, {}) == text
