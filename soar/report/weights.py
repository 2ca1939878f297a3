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
from soar.report.export import ExportError, card, check_target
from soar.report.runs import Run, changed_after_run, read_run
from soar.report.text import ARM_MEANINGS, arm_name, with_interval

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
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


def _adapter_of(run_dir: Path, policy: str) -> tuple[Path, dict[str, Any]]:
    """Folder and settings of a policy's adapter, whose weights are whole as far as their header says. Raises ExportError."""
    from safetensors import SafetensorError, safe_open

    if policy not in POLICIES:
        raise ExportError(f"--policy {policy!r}: expected one of {', '.join(POLICIES)}")
    again = "`soar run --out RUN --resume` writes it again from the last checkpoint"
    settings_file, weights_file = (run_dir / POLICIES[policy] / name for name in ADAPTER_FILES)
    for path in (settings_file, weights_file):
        if not path.is_file():
            raise ExportError(
                f"{path} is missing: adapters are written after the evaluation, and an arm that did not run has "
                "none; finish the run with `soar run ... --resume`, or choose another --policy"
            )
        if changed_after_run(run_dir, f"{POLICIES[policy]}/{path.name}"):
            raise ExportError(f"{path} was changed after the run (hashes.json knows another sha256); {again}")
    try:
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        _rank(settings)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ExportError(f"{settings_file} is damaged ({error}); {again}") from error
    try:
        with safe_open(weights_file, framework="numpy") as file:
            file.keys()
    except SafetensorError as error:
        raise ExportError(f"{weights_file} is damaged ({error}); {again}") from error
    return run_dir / POLICIES[policy], settings


def _rank(settings: dict[str, Any]) -> int:
    return max([int(settings["r"]), *map(int, (settings.get("rank_pattern") or {}).values())])


def _sources(run: Run) -> tuple[str, dict[str, Any]]:
    """Path or hub id of the base model, and the loader's options, as the run had them."""
    model = run.config.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("path"), str):
        raise ExportError(f"{run.path / 'manifest.json'} names no base model (config.model.path)")
    options = {key: model[key] for key in ("revision", "gguf_file") if model.get(key)}
    if "gguf_file" not in options:
        options["trust_remote_code"] = bool(model.get("trust_remote_code"))
    return resolve_path(model["path"]), options


def model_card(run: Run, policy: str, merged: bool, rank: int = 0) -> bytes:
    """README.md of exported weights: what they are, the held-out result with its interval, how to load them.

    A base model that is a folder of this machine is named as the run named it, and not in the card's metadata.
    """
    base, arms, arm = visible(str(run.config["model"]["path"])), run.arms, ARM_OF.get(policy, "")
    k = min(arms[arm].pass_at) if arm in arms else 0
    shown = [arms[name] for name in dict.fromkeys(("base", "hard_only", arm)) if name in arms]
    return card(
        "weights",
        name=run.name,
        policy=policy,
        meaning=MEANINGS[policy][0].upper() + MEANINGS[policy][1:],
        merged=merged,
        rank=rank,
        base=base,
        on_hub=not base.startswith("builtin:") and not Path(base).exists(),
        options="".join(f", {key}={value!r}" for key, value in _sources(run)[1].items() if value),
        k=k,
        seed=run.manifest.get("seed"),
        results=[f"{arm_name(entry.name)}: {with_interval(entry, k)}" for entry in shown if k in entry.pass_at],
    )


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
    adapter, settings = _adapter_of(run_dir, policy)
    base, options = _sources(run)
    out.mkdir(parents=True, exist_ok=True)
    _save_tokenizer(base, options, out)
    shutil.copyfile(adapter / ADAPTER_FILES[1], out / ADAPTER_FILES[1])
    write_json(out / ADAPTER_FILES[0], {**settings, "base_model_name_or_path": base})
    write_atomic(out / "README.md", model_card(run, policy, merged=False, rank=_rank(settings)))
    return sorted(out.iterdir())


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
    adapter, _ = _adapter_of(run_dir, policy)
    base, options = _sources(run)
    weights: dict[str, Any] = {} if "gguf_file" in options else {"use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", **options, **weights)
    if "gguf_file" in options:  # plain weights once it is loaded, but it keeps the mark that forbids saving them
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    stored = model.dtype
    merged = PeftModel.from_pretrained(model.to(torch.float32), str(adapter)).merge_and_unload()
    out.mkdir(parents=True, exist_ok=True)
    merged.to(stored).save_pretrained(out)
    _save_tokenizer(base, options, out)
    write_atomic(out / "README.md", model_card(run, policy, merged=True))
    return sorted(out.iterdir())
