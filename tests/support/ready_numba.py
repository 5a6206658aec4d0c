"""Imported by a process from which engines are forked: numba's registries, filled at its first call."""

from __future__ import annotations

from numba.core.registry import cpu_target

import mem_triton.ops.memory_attention.cpu.paged_numba  # noqa: F401  its functions are loaded by each fork

cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()
