"""Ray itself: importing it, joining a cluster or starting one on this machine, and what a cluster holds."""

from __future__ import annotations

import importlib
import os
import re
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from soar.config import Config, ConfigError

CLIENT = "ray://"  # addresses of Ray's client, for a driver outside of the cluster

REACH_S = 10.0  # how long the head of a cluster may take to answer a first knock


def import_ray(address: str = "") -> Any:
    """The `ray` module, told to show this machine's token to the cluster at `address`. Raises ConfigError without Ray.

    A Ray that was ever started by a program leaves a token, and a cluster that is started beside one asks for it; who joins
    shows it only when told to before Ray is imported.
    """
    if address and _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            "cluster.workers and cluster.address need Ray, which is not installed: pip install 'soar-rl[ray]'"
        ) from error


def _has_token() -> bool:
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return given or (Path.home() / ".ray" / "auth_token").is_file()


def check_cluster(config: Config) -> None:
    """Refuse a cluster that cannot be there, before a model is loaded: Ray itself takes minutes to say so, or exits.

    Raises ConfigError when Ray is missing or nothing listens at `cluster.address`.
    """
    cluster = config.cluster
    if cluster.workers or cluster.address:
        import_ray(cluster.address)
    host, _, port = cluster.address.removeprefix(CLIENT).rpartition(":")
    if not host or not port.isdigit():
        return  # auto, or a form that Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except (OSError, OverflowError) as error:
        default = "10001" if cluster.address.startswith(CLIENT) else "6379"
        raise ConfigError(
            f"cluster.address = {cluster.address!r} cannot be reached: nothing answers at {host}, port {port} ({error}). "
            f"Start the cluster there with `ray start --head`, and give the address and port that it prints (by default "
            f"{default} for this kind of address)"
        ) from error


Connection = Literal["found", "joined", "started"]


def connect(ray: Any, config: Config) -> Connection:
    """Join the cluster of `cluster.address`, or start one on this machine.

    A Ray that this process is connected to already is used as it is ("found"). Raises ConfigError when the address does not
    answer.
    """
    if ray.is_initialized():
        return "found"
    cluster = config.cluster
    quiet = {"log_to_driver": False, "configure_logging": False}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if cluster.address:
            ray.init(address=cluster.address, **quiet)
            return "joined"
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cores = max(os.cpu_count() or 1, int(-(-cluster.workers * cluster.cpus // 1)))
        ray.init(
            address="local",
            num_cpus=cores,
            include_dashboard=False,
            object_store_memory=cluster.store_mb * 2**20,
            _node_ip_address="127.0.0.1",
            **quiet,
        )
        return "started"
    except (ConnectionError, ValueError, RuntimeError, OSError, SystemExit) as error:  # Ray may end the process
        advice = "It is started with `ray start --head`; a Ray that asks for a token wants its RAY_AUTH_TOKEN here"
        where = f"cluster.address = {cluster.address!r}" if cluster.address else "Ray"
        raise ConfigError(f"{where} cannot be reached: {in_short(error)}. {advice}") from error
    finally:
        _restore(handlers)


def _restore(handlers: dict[Any, Any]) -> None:
    """Ray listens to signals itself when it starts; what the run made of them counts."""
    for number, handler in handlers.items():
        with suppress(ValueError, TypeError):  # not the main thread, which cannot listen anyway
            signal.signal(number, handler)


def workers_for(resources: dict[str, float], cpus: float, gpus: float) -> int:
    """How many workers of `cpus` cores and `gpus` GPUs a cluster holds in all."""
    by_cpu = int(resources.get("CPU", 0.0) / cpus)
    return min(by_cpu, int(resources.get("GPU", 0.0) / gpus)) if gpus else by_cpu


def free_words(resources: dict[str, float]) -> str:
    """`8 cores and 2 GPUs`."""
    return f"{resources.get('CPU', 0.0):g} cores and {resources.get('GPU', 0.0):g} GPUs"


def in_short(error: BaseException) -> str:
    """The first and the last line of an error that say something: what Ray saw, and what it came from."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # Ray's colours
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"[:500]
