"""Trained policies of a finished run for other programs: PEFT adapter folders and merged models.

The run folder already holds adapters in PEFT's format; this adds what a reader elsewhere needs beside them: tokenizer,
card, a base model path that resolves. Merging is PEFT's `merge_and_unload`. Left out: quantised formats, which have tools.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from soar.engine.load import resolve_path
from soar.files import visible, write_atomic, write_json
from soar.report.export import ExportError, check_target
from soar.report.runs import Run, changed_after_run, read_run
from soar.report.text import ARM_MEANINGS, arm_name, with_interval
from soar.types import VERSION

ARM_OF = {"student": "ps", **{name: name for name in ARM_MEANINGS if name not in ("base", "ps")}}
"""Name of a policy -> the arm that its held-out result stands under. `student` is the promoted student (PS)."""

POLICIES = {
    "student": "student",
    "teacher": "teacher",
    **{name: f"arms/{name}" for name in ARM_OF if name != "student"},
}
"""Name of a policy -> its adapter in the run folder."""

MEANINGS = {
    **ARM_MEANINGS,
    "student": "the promoted student of the outer loop (PS)",
    "teacher": "the teacher, which writes practice questions",
    "pq": "a fresh student trained on the promotion questions and the hard training half",
    "hard_only": "a student trained on the hard training half alone, the baseline of the run",
}


def _adapter_of(run_dir: Path, policy: str) -> Path:
    if policy not in POLICIES:
        raise ExportError(f"--policy {policy!r}: expected one of {', '.join(POLICIES)}")
    folder = run_dir / POLICIES[policy]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ExportError(
                f"{folder / name} is missing: adapters are written after the evaluation, and an arm that did not run has "
                "none; finish the run with `soar run ... --resume`, or choose another --policy"
            )
        if changed_after_run(run_dir, f"{POLICIES[policy]}/{name}"):
            raise ExportError(f"{folder / name} was changed after the run (hashes.json knows another sha256); {_AGAIN}")
    return folder


def _settings_of(adapter: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter whose weights are whole as far as their own header says. Raises ExportError."""
    from safetensors import SafetensorError, safe_open

    try:
        settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        max([int(settings["r"]), *map(int, (settings.get("rank_pattern") or {}).values())])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ExportError(f"{adapter / 'adapter_config.json'} is damaged ({error}); {_AGAIN}") from error
    try:
        with safe_open(adapter / "adapter_model.safetensors", framework="numpy") as file:
            file.keys()
    except SafetensorError as error:
        raise ExportError(f"{adapter / 'adapter_model.safetensors'} is damaged ({error}); {_AGAIN}") from error
    return settings


_AGAIN = "`soar run --out RUN --resume` writes it again from the last checkpoint"


def _sources(run: Run) -> tuple[str, dict[str, Any]]:
    """Path or hub id of the base model, and the loader's options, as the run had them."""
    model = run.config.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("path"), str):
        raise ExportError(f"{run.path / 'manifest.json'} names no base model (config.model.path)")
    options = {key: model[key] for key in ("revision", "gguf_file") if model.get(key)}
    if "gguf_file" not in options:
        options["trust_remote_code"] = bool(model.get("trust_remote_code"))
    return resolve_path(model["path"]), options


def model_card(run: Run, policy: str, merged: bool, rank: int) -> bytes:
    """README.md of exported weights: what they are, the held-out result with its interval, how to load them.

    A base model that is a folder of this machine is named as the run named it, and not in the card's metadata.
    """
    base = visible(str(run.config["model"]["path"]))
    _, options = _sources(run)
    extra = "".join(f", {key}={value!r}" for key, value in options.items() if value)
    base_call = f"AutoModelForCausalLM.from_pretrained({json.dumps(base)}{visible(extra)})"
    loading = (
        'AutoModelForCausalLM.from_pretrained("path/to/this/folder")'
        if merged
        else f'PeftModel.from_pretrained({base_call}, "path/to/this/folder")'
    )
    on_hub = not base.startswith("builtin:") and not Path(base).exists()
    lines = ["---", *([f"base_model: {json.dumps(base)}"] if on_hub else []), "tags: [soar, reinforcement-learning]"]
    lines += ["library_name: transformers" if merged else "library_name: peft", "pipeline_tag: text-generation", "---"]
    lines += [
        f"# {json.dumps(visible(run.name))}: {policy}",
        "",
        f"{MEANINGS[policy][0].upper()}{MEANINGS[policy][1:]} of a run of SOAR",
        f"([arXiv 2601.18778](https://arxiv.org/abs/2601.18778)), {'merged into' if merged else 'an adapter on'} "
        f"`{base}`.",
        "",
        "```python",
        loading,
        "```",
        "",
    ]
    if not merged and rank > 64:
        lines += [f"The adapter has rank {rank}; servers with a limit on ranks need merged weights instead.", ""]
    arms = run.arms
    shown = [arms[name] for name in dict.fromkeys(("base", "hard_only", ARM_OF.get(policy, ""))) if name in arms]
    if policy in ARM_OF and ARM_OF[policy] in arms:
        k = min(arms[ARM_OF[policy]].pass_at)
        lines += [
            f"Held-out pass@{k} with 95 % intervals over problems, one run with seed {run.manifest.get('seed')}:",
            "",
        ]
        lines += [f"- {arm_name(arm.name)}: {with_interval(arm, k)}" for arm in shown if k in arm.pass_at]
        lines.append("")
    lines += [f"Written by soar {VERSION}.", ""]
    return "\n".join(lines).encode()


def _save_tokenizer(base: str, options: dict[str, Any], out: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(base, **options).save_pretrained(out)


def export_adapter(run_dir: Path, out: Path, policy: str = "student") -> list[Path]:
    """Write a policy as a PEFT adapter folder with tokenizer and card; returns the files.

    An embedded base model (`builtin:NAME`) is named by its folder in the installed package. Raises ReportError for no run
    folder, ExportError for a policy that the run does not have or a target in use, OSError when the tokenizer cannot be
    loaded.
    """
    check_target(out)
    run = read_run(run_dir)
    adapter = _adapter_of(run_dir, policy)
    base, options = _sources(run)
    settings = _settings_of(adapter)
    settings["base_model_name_or_path"] = base
    out.mkdir(parents=True, exist_ok=True)
    _save_tokenizer(base, options, out)
    shutil.copyfile(adapter / "adapter_model.safetensors", out / "adapter_model.safetensors")
    write_json(out / "adapter_config.json", settings)
    rank = max([int(settings["r"]), *(settings.get("rank_pattern") or {}).values()])
    write_atomic(out / "README.md", model_card(run, policy, merged=False, rank=rank))
    return sorted(path for path in out.iterdir())


def _forget_quantization(model: Any) -> None:
    """A GGUF model has plain weights once it is loaded, but keeps the mark that forbids saving them."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def export_merged(run_dir: Path, out: Path, policy: str = "student") -> list[Path]:
    """Write base model and adapter as one model folder (safetensors) with tokenizer and card; returns the files.

    The product is taken in float32 and stored in the base model's own type. Raises as `export_adapter`.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_target(out)
    run = read_run(run_dir)
    adapter = _adapter_of(run_dir, policy)
    _settings_of(adapter)
    base, options = _sources(run)
    weights: dict[str, Any] = {} if "gguf_file" in options else {"use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", **options, **weights)
    if "gguf_file" in options:
        _forget_quantization(model)
    stored = model.dtype
    merged = PeftModel.from_pretrained(model.to(torch.float32), str(adapter)).merge_and_unload()
    out.mkdir(parents=True, exist_ok=True)
    merged.to(stored).save_pretrained(out)
    _save_tokenizer(base, options, out)
    write_atomic(out / "README.md", model_card(run, policy, merged=True, rank=0))
    return sorted(path for path in out.iterdir())
