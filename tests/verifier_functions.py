"""User verifier functions for the tests: one that does what the completion says, and ones of a wrong shape."""

import os
import signal
import time
from typing import Any


def obey(completions: list[str], answer: list[str], **columns: Any) -> list[Any]:
    """Behave as the completion asks; otherwise 1.0 when it equals the gold answer."""
    text = completions[0]
    if error := {"raise": KeyError("no such key"), "exit": SystemExit(3), "mute": Mute()}.get(text):
        raise error
    if text == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "sleep":
        time.sleep(3600)
    if text == "eat memory":
        return [float(len(bytearray(8 * 2**30)))]
    if text == "secrets":
        return [float(any("TOKEN" in key or "SECRET" in key for key in os.environ))]
    if text == "print":
        print('[true, "correct", null] \u00e9')
    if text == "level":
        return [1.0 if columns["level"] == ["hard"] else 0.0]
    special = {"none": None, "nan": float("nan"), "half": 0.5, "two": 2.0, "bool": True, "minus": -1.0}
    return [special.get(text, 1.0 if text == answer[0] else 0.0)]


class Mute(Exception):
    __str__ = None  # type: ignore[assignment]
