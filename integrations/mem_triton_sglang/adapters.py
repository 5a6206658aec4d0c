"""Records which LoRA adapters SGLang's tokenizer manager has loaded, and what their files held then."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.tokenizer_manager import TokenizerManager

from mem_triton.systems.lora import LoadedAdapters, files_digest

TENSORS = "__tensor__"
"""What SGLang calls the path of an adapter that came as tensors."""


class KnownAdapters(TokenizerManager):
    """Notes each load, also that of an adapter which SGLang had dropped to make room."""

    def know_adapters(self) -> None:
        """Note the adapters that the server was started with."""
        self._loras = LoadedAdapters(self.server_args.max_loaded_loras)
        for lora in self.lora_ref_cache.values():
            self._loras.loaded(lora.lora_name, lora.lora_path, files_digest(lora.lora_path))

    def identity_of(self, name: str) -> str:
        """Which adapter answers under this name."""
        loaded = self.lora_ref_cache.get(name)
        path = loaded.lora_path if loaded is not None and loaded.lora_path != TENSORS else None
        return self._loras.identity(name, name, path)

    async def load_lora_adapter(self, obj: Any, request: Any = None) -> Any:
        before = files_digest(obj.lora_path)
        result = await super().load_lora_adapter(obj, request)
        if result.success:
            self._loras.loaded(obj.lora_name, obj.lora_path, before)
        return result

    async def load_lora_adapter_from_tensors(self, obj: Any, request: Any = None) -> Any:
        result = await super().load_lora_adapter_from_tensors(obj, request)
        if result.success:
            self._loras.loaded(obj.lora_name, None, None)
        return result

    async def unload_lora_adapter(self, obj: Any, request: Any = None) -> Any:
        result = await super().unload_lora_adapter(obj, request)
        if result.success:
            self._loras.forget(obj.lora_name)
        return result
