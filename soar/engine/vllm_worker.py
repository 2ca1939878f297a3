"""What runs inside a vLLM worker: adapters taken from tensors, without a file. vLLM adds the class to its own worker's bases.

Nothing here is imported by the rest of the package, and vLLM only where it runs.
"""

from __future__ import annotations

from typing import Any


class AdapterExtension:
    """Methods that `VllmEngine` calls by name on every worker (`worker_extension_cls`); `self` is vLLM's worker."""

    def soar_load(self, adapter_id: int, tensors: dict[str, Any], rank: int, alpha: float) -> bool:
        """Add an adapter under a new id. tensors: PEFT names -> A [rank, in] and B [out, rank]."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        manager = self.model_runner.lora_manager  # type: ignore[attr-defined]
        inner = manager._adapter_manager
        mapper = getattr(inner.model, "hf_to_vllm_mapper", None)
        lora = LoRAModel.from_lora_tensors(
            adapter_id,
            tensors,
            PEFTHelper(r=rank, lora_alpha=alpha, target_modules="all-linear"),
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
            weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        )
        known = {name for module in inner.supported_lora_modules for name in _parts(inner, module)}
        strange = sorted({name.rsplit(".", 1)[-1] for name in lora.loras} - known)
        if strange:
            raise ValueError(f"vLLM puts no adapter on {', '.join(strange)}; name other model.target_modules")
        inner.add_adapter(lora)
        return adapter_id in manager.list_adapters()

    def soar_drop(self, adapter_id: int) -> bool:
        """Forget an adapter."""
        return bool(self.model_runner.lora_manager.remove_adapter(adapter_id))  # type: ignore[attr-defined]


def _parts(inner: Any, module: str) -> list[str]:
    """Names that the layers of the original model have: vLLM packs query, key and value into one."""
    return [*inner.packed_modules_mapping.get(module, ()), module]
