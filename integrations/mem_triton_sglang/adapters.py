"""Records which LoRA adapters SGLang's tokenizer manager has loaded, and what their files held then."""

from __future__ import annotations

import os
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from sglang.srt.managers.tokenizer_manager import TokenizerManager

from mem_triton.runtime.incidents import VARIABLE
from mem_triton.systems.lora import Adapter, Files, LoadedAdapters, files_of

TENSORS = "__tensor__"
"""What SGLang calls the path of an adapter that came as tensors."""


class KnownAdapters(TokenizerManager):
    """Notes each load, also that of an adapter which SGLang had dropped to make room."""

    def know_adapters(self) -> None:
        """Look at the adapters that the server is started with; its schedulers are loading them.

        Files that were changed since the launch began may be others than those that a scheduler has read.
        """
        self._loras = LoadedAdapters(self.server_args.max_loaded_loras)
        launched = Path(os.environ[VARIABLE]).parent.stat().st_mtime_ns  # made before any scheduler was
        self._loading: dict[str, Files | None] = {}
        for lora in self.lora_ref_cache.values():
            files = files_of(lora.lora_path)
            self._loading[lora.lora_name] = None if any(changed > launched for *_, changed in files) else files

    def answering(self, name: str | None) -> Adapter | None:
        """The LoRA adapter that answers under this name. None for none.

        Those that the server was started with are there by now: they are what their files were before, if these have
        not changed.
        """
        while self._loading:
            started, files = self._loading.popitem()
            self._loras.loaded(started, self._path_of(started), files)
        return self._loras.answering(name, name, self._path_of(name)) if name else None

    def _path_of(self, name: str) -> str | None:
        loaded = self.lora_ref_cache.get(name)
        return loaded.lora_path if loaded is not None and loaded.lora_path != TENSORS else None

    async def load_lora_adapter(self, obj: Any, request: Any = None) -> Any:
        return await self._noted(obj.lora_name, obj.lora_path, super().load_lora_adapter(obj, request))

    async def load_lora_adapter_from_tensors(self, obj: Any, request: Any = None) -> Any:
        return await self._noted(obj.lora_name, None, super().load_lora_adapter_from_tensors(obj, request))

    async def unload_lora_adapter(self, obj: Any, request: Any = None) -> Any:
        result = await super().unload_lora_adapter(obj, request)
        if result.success:
            self._loading.pop(obj.lora_name, None)
            self._loras.forget(obj.lora_name)
        return result

    async def _noted(self, name: str, path: str | None, loading: Awaitable[Any]) -> Any:
        """The result of a load; one whose caller leaves may have happened."""
        with self._loras.loading(name, path) as loaded:
            result = await loading
            if result.success:
                self._loading.pop(name, None)
                loaded()
        return result
