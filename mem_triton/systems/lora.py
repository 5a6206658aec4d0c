"""Which LoRA adapter answers a request: states and cached keys and values that were computed under it belong to it."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from mem_triton.store.bank.fingerprint import sampled_digest

FILES = "adapter_*"
"""peft's ``adapter_config.json`` and ``adapter_model.safetensors``."""


def lora_identity(name: str, path: str | None) -> str:
    """An adapter's name and a digest of its files, which nobody has to see; "" for no name.

    An adapter that is loaded anew under its name with other weights is another one. path: a folder; of anything else
    the digest is that of the path itself. Takes about a millisecond when a file has changed.
    """
    if not name:
        return ""
    return f"{name}:{_digest(path or '', _state(path))[:8]}"


def _state(path: str | None) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of the adapter's files."""
    if not path or not Path(path).is_dir():
        return ()
    stats = [(file.name, file.stat()) for file in sorted(Path(path).glob(FILES)) if file.is_file()]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


@lru_cache(maxsize=256)
def _digest(path: str, state: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, *_ in state:
        digest.update(f"{name} {sampled_digest(Path(path, name))}\n".encode())
    return digest.hexdigest() if state else hashlib.sha256(path.encode()).hexdigest()
