"""Judges: the oracle is exact, self-consistency counts votes, an endpoint is asked as its interface says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from loop_helpers import tiny_config
from recited import ANSWERS, Recited

from soar.config import Config, ConfigError
from soar.domains.world import get_world
from soar.loop import judges
from soar.loop.judges import Endpoint, JudgeError, Label, Oracle, SelfConsistency, open_judge, read_opinion
from soar.problems.pool import VerifierPool
from soar.types import Problem


def test_the_oracle_is_the_worlds() -> None:
    problems = [Problem("a", "47 c+8", "55"), Problem("b", "47 c+8", "45"), Problem("c", "c+8 47", "55")]
    assert Oracle(get_world("tiny")).label(problems) == [Label(True, True), Label(True, False), Label(False, False)]


def test_self_consistency_counts_votes() -> None:
    config = tiny_config("judge.attempts=4", "judge.agreement=0.5")
    problems = [Problem(q, q, "1") for q in ANSWERS]
    env: Any = Recited()
    labels = dict(zip(ANSWERS, SelfConsistency(env, config).label(problems), strict=True))
    assert labels["always"] == labels["half"] == Label(True, True)
    assert labels["never"] == Label(True, False)  # two of four say 2
    assert labels["once"] == labels["silent"] == Label(False, False)
    assert env.asked[0]["stack"] is None
    assert SelfConsistency(env, config).label([]) == []


@pytest.mark.parametrize(
    ("reply", "opinion"),
    [
        ("WELL_POSED: yes\nANSWER: 42", (True, "42")),
        ("well_posed: **No**\nanswer: none", (False, None)),
        ("The form is WELL_POSED: yes or no.\nWELL_POSED: no\nANSWER: none", (False, None)),
        ("ANSWER: 1\nWELL_POSED: yes\nANSWER: **7**", (True, "7")),
        ("yes", (None, None)),
        ("", (None, None)),
        ("WELL_POSED:" + " " * 100_000 + "yes", (None, None)),
        ("WELL_POSED: yes\nANSWER: " + "9" * 5000, (True, "9" * 2000)),
    ],
)
def test_opinions_are_read_from_the_last_lines(reply: str, opinion: Any) -> None:
    assert read_opinion(reply) == opinion


class Server(HTTPServer):
    """Answers chat completions with `replies` in turn: (status, text or body); `requests` holds what came."""

    replies: list[tuple[int, Any]]
    requests: list[tuple[str, dict[str, str], Any]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        status, text = self.server.replies.pop(0)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", text)
        self.end_headers()
        content = {"choices": [{"message": {"content": text}}]} if isinstance(text, str) else text
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server(("127.0.0.1", 0), Handler)
    found.replies, found.requests = [], []
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def endpoint(server: Server, monkeypatch: pytest.MonkeyPatch, *more: str) -> Endpoint:
    monkeypatch.setattr(judges.time, "sleep", lambda seconds: None)
    url = f"http://127.0.0.1:{server.server_port}/v1"
    config = tiny_config("judge.kind=endpoint", f"judge.url={url}", "judge.model=grader", *more)
    env: Any = SimpleNamespace(verifier=VerifierPool("number", answer_style="marker"))
    return Endpoint(config.judge, env)


def test_an_endpoint_is_asked_and_its_answer_compared(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOAR_JUDGE_KEY", "s3cret")
    replies = [
        "WELL_POSED: yes\nANSWER: 4.0",
        "WELL_POSED: yes\nANSWER: 5",
        "WELL_POSED: no\nANSWER: none",
        "hm",
        "WELL_POSED: yes",
    ]
    server.replies = [(200, reply) for reply in replies]
    problems = [Problem(str(i), f"2 + 2? {{{i}}}", "4") for i in range(5)]
    labels = endpoint(server, monkeypatch).label(problems)
    assert labels == [Label(True, True), Label(True, False), Label(False, False), Label(None, None), Label(True, None)]
    path, headers, body = server.requests[3]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer s3cret"
    assert (body["model"], body["temperature"], len(body["messages"])) == ("grader", 0, 1)
    assert "2 + 2? {3}" in body["messages"][0]["content"]


def test_a_busy_endpoint_is_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOAR_JUDGE_KEY", raising=False)
    server.replies = [(503, "busy"), (200, {"no": "choices"}), (200, "WELL_POSED: yes\nANSWER: 4")]
    assert endpoint(server, monkeypatch).label([Problem("a", "2 + 2?", "4")]) == [Label(True, True)]
    assert len(server.requests) == 3
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize(
    ("replies", "message", "asked"),
    [
        ([(401, "no")] * 3, "HTTP 401", 1),
        ([(500, "no")] * 3, "HTTP 500", 3),
        ([(200, {"choices": [{"message": {"content": None}}]})] * 3, "content is NoneType, expected text", 3),
        ([(302, "http://127.0.0.1:1/elsewhere")] * 3, "HTTP 302", 1),
    ],
)
def test_an_endpoint_that_does_not_answer_is_named(
    server: Server, monkeypatch: pytest.MonkeyPatch, replies: Any, message: str, asked: int
) -> None:
    server.replies = list(replies)
    with pytest.raises(JudgeError, match=message) as caught:
        endpoint(server, monkeypatch).label([Problem("a", "2 + 2?", "4")])
    assert "judge.url" in str(caught.value)
    assert len(server.requests) == asked


def test_open_judge_follows_the_config() -> None:
    def opened(*overrides: str, verifier: str = "exact") -> Any:
        env: Any = SimpleNamespace(verifier=VerifierPool(verifier))
        config: Config = tiny_config(*overrides)
        return open_judge(env, config)

    assert opened().name == "oracle of world:tiny"
    assert opened("problems.source=file.jsonl").name == "self-consistency of 16 attempts, agreement 0.5"
    assert isinstance(opened("judge.kind=self_consistency"), SelfConsistency)
    with pytest.raises(
        ConfigError, match=r'judge.kind = "oracle": problems.source = \'file.jsonl\' has no exact oracle'
    ):
        opened("judge.kind=oracle", "problems.source=file.jsonl")
    with pytest.raises(ConfigError, match=r"judge.url \(found '', expected"):
        opened("judge.kind=endpoint")
    with pytest.raises(ConfigError, match=r"problems\.verifier = 'grade:me' reads whole completions"):
        opened("judge.kind=endpoint", "judge.url=http://h/v1", "judge.model=m", verifier="grade:me")
