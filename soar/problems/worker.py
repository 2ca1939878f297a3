"""A verifier worker: a program of its own that does one check at a time, started by `pool.py`.

It imports this package and what the verifier's name says, never the script of its caller. It keeps few environment variables,
limits its address space, and ends with its caller.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from soar.problems import domain
from soar.problems.reward import adapt
from soar.problems.verify import VerifierError
from soar.types import Verdict

MARK = "SOAR_VERIFIER_WORKER"
ORPHAN_S = 60  # beyond its time limit, after which a check ends that nobody waits for any more
KEPT = {
    "PATH", "HOME", "LANG", "LANGUAGE", "TMPDIR", "TEMP", "TMP", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV",
    "PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "PYTHONUTF8",
}  # fmt: skip

Check = Callable[[str, str, Any], Verdict | str]


def kept_environment() -> dict[str, str]:
    """The environment variables that a check needs: no tokens and keys."""
    kept = {key: value for key, value in os.environ.items() if key.upper() in KEPT or key.startswith("LC_")}
    return {**kept, "OMP_NUM_THREADS": "1", MARK: "1"}


def limit_memory(memory_mb: int) -> None:
    """Cap the address space of this process and switch core files off, where the system can."""
    try:
        import resource
    except ImportError:
        return
    limits = [(resource.RLIMIT_CORE, 0)]
    if memory_mb and hasattr(resource, "RLIMIT_AS"):
        limits.append((resource.RLIMIT_AS, memory_mb * 2**20))
    for kind, value in limits:
        _, hard = resource.getrlimit(kind)
        try:
            resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
        except (ValueError, OSError):
            logging.getLogger(__name__).debug("this system refuses a limit on resource %s of a verifier worker", kind)


def load_check(name: str, key: str) -> Check:
    """The check of a verifier or a domain. Raises what a user's module raises."""
    if key == "problems.domain":
        return domain.Grader(domain.load_domain(name))
    if ":" not in name:
        from soar.problems.symbolic import check_symbolic

        check_symbolic("math", r"\int x^2 dx", r"\int x dx")  # sympy loads half of itself at the first comparison
        return check_symbolic
    reward = adapt(domain.load_function(name), name)
    return lambda task, completion, row: json.dumps(reward(completion, row))


def serve(descriptor: int) -> None:
    """Do checks until the caller is gone. The first message is (name, key, memory_mb, script, timeout_s); then come checks.

    Answers are JSON, since a check may have run anything: [whether it is a verdict, verdict or text, message or null], or
    {"error": message} for what is wrong with the verifier itself.
    """
    os.dup2(2, 1)  # what a user's function prints belongs to no table of its caller
    link = Connection(descriptor)
    answer: Any
    try:
        name, key, memory_mb, domain.main_script, timeout_s = link.recv()
        try:
            check = load_check(name, key)
        except Exception as error:  # whatever a user's module raises on import must reach the user by name
            answer = {"error": f"{key} = {name!r} cannot be loaded: {type(error).__name__}: {error}"}
            return link.send_bytes(json.dumps(answer).encode())
        limit_memory(memory_mb)
        link.send_bytes(b"[]")
        while True:
            item = link.recv()
            signal.alarm(int(10 * timeout_s) + ORPHAN_S)
            try:
                result = check(*item)
                answer = [isinstance(result, Verdict), result, None]
            except VerifierError as error:
                answer = {"error": str(error)}
            except Exception as error:  # a check may fail in any way; that is its verdict
                answer = [True, Verdict.CRASHED, f"{name}: {type(error).__name__}: {error}"[:500]]
            link.send_bytes(json.dumps(answer).encode())
    except (EOFError, OSError):
        sys.exit(0)
