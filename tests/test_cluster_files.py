"""The example files for clusters: they parse, and the commands in them are ones that `soar` understands."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from typing import Any

import house
import pytest
import yaml

from soar import cli, cli_run
from soar.config import HARMLESS, ClusterConfig

FILES = house.ROOT / "examples" / "cluster"


def config_of(words: list[str]) -> Any:
    """The config that a `soar` command line makes, resumed or not."""
    arguments = cli._parser().parse_args(words[1:])
    arguments.resume = False
    return cli_run._run_config(arguments)


def test_the_slurm_script_is_valid_and_its_command_is_understood() -> None:
    script = (FILES / "slurm.sh").read_text(encoding="utf-8")
    if shutil.which("bash"):
        assert subprocess.run(["bash", "-n", str(FILES / "slurm.sh")], capture_output=True, text=True).stderr == ""
    (command,) = re.findall(r"soar run (.+?) &$", script.replace("\\\n", " "), re.MULTILINE)
    values = {'"${again[@]}"': "small-1gpu", "$out": "runs/x", "$address:$port": "10.0.0.1:6379", "$workers": "15"}
    for name, value in values.items():
        command = command.replace(name, value)
    cluster = config_of(["soar", "run", *shlex.split(command)]).cluster
    assert (cluster.workers, cluster.address, cluster.cpus) == (15, "10.0.0.1:6379", 7)
    limits = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", script, re.MULTILINE))
    assert int(limits["gpus-per-node"]) * cluster.cpus <= int(limits["cpus-per-task"])


def test_the_kubernetes_job_is_valid_and_its_commands_are_understood() -> None:
    job = yaml.safe_load((FILES / "rayjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    shell, flag, script = shlex.split(job["spec"]["entrypoint"])
    assert (shell, flag) == ("sh", "-c")
    commands = re.findall(r"exec (soar run [^;]+);", script)
    assert len(commands) == 2
    for command in commands:
        cluster = config_of(shlex.split(command)).cluster
        assert (cluster.workers, cluster.address) == (group["replicas"], "auto")
    cores = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert cluster.cpus < cores


@pytest.mark.parametrize(
    ("word", "expected"),
    [("3", (3, "")), ("auto", (0, "auto")), ("ray://head:10001", (0, "ray://head:10001")), ("0", (0, ""))],
)
def test_workers_are_a_number_or_an_address(word: str, expected: tuple[int, str]) -> None:
    cluster = config_of(["soar", "run", "--workers", word]).cluster
    assert (cluster.workers, cluster.address) == expected


def test_no_key_of_the_cluster_decides_a_result() -> None:
    assert {key for key in HARMLESS if key.startswith("cluster.")} == {
        f"cluster.{key}" for key in ClusterConfig.model_fields
    }


def test_the_page_names_every_event_of_the_log() -> None:
    page = (house.ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    source = (house.ROOT / "soar" / "ray_crew.py").read_text(encoding="utf-8")
    events = set(re.findall(r'_note\(\s*"([a-z]+)"|"event": "([a-z]+)"', source))
    names = {a or b for a, b in events}
    assert names == {"opened", "started", "done", "lost"}
    for name in names:
        assert f"| `{name}` |" in page
