"""Lists every hook on SGLang's code in one table, and checks that all of them were applied.

SGLang only logs a hook that it cannot apply, and goes on without. Memory without one of them would answer wrongly, so
each process that starts an engine with memory looks whether they are in place.
"""

from __future__ import annotations

from contextlib import ExitStack
from importlib import import_module
from typing import Any

from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from mem_triton.compat import TESTED_VERSIONS, UnsupportedVersionError, require

HOOKS: dict[str, tuple[str, HookType]] = {
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.__init__": (
        "mem_triton_sglang.engines:after_init",
        HookType.AFTER,
    ),
    "sglang.srt.utils.weight_versions.build_endpoint_weight_version_metadata": (
        "mem_triton_sglang.engines:after_metadata",
        HookType.AFTER,
    ),
    "sglang.srt.managers.schedule_batch.Req.__init__": ("mem_triton_sglang.worker:after_request", HookType.AFTER),
    "sglang.srt.mem_cache.radix_cache.RadixKey.__init__": ("mem_triton_sglang.radix_keys:after_init", HookType.AFTER),
    "sglang.srt.model_executor.model_runner.ModelRunner.initialize": (
        "mem_triton_sglang.worker:after_initialize",
        HookType.AFTER,
    ),
    "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size": (
        "mem_triton_sglang.worker:after_cell_size",
        HookType.AFTER,
    ),
    "sglang.srt.model_executor.model_runner.ModelRunner.alloc_memory_pool": (
        "mem_triton_sglang.worker:after_alloc",
        HookType.AFTER,
    ),
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new": (
        "mem_triton_sglang.worker:after_init_new",
        HookType.AFTER,
    ),
    "sglang.srt.managers.schedule_policy.SchedulePolicy.calc_priority": (
        "mem_triton_sglang.places:after_priority",
        HookType.AFTER,
    ),
    "sglang.srt.managers.scheduler.Scheduler.get_num_allocatable_reqs": (
        "mem_triton_sglang.places:after_room",
        HookType.AFTER,
    ),
    "sglang.srt.managers.scheduler.Scheduler._get_new_batch_prefill_raw": (
        "mem_triton_sglang.places:before_pass",
        HookType.BEFORE,
    ),
    "sglang.srt.mem_cache.memory_pool.ReqToTokenPool.free": ("mem_triton_sglang.worker:before_free", HookType.BEFORE),
}
"""Function of SGLang -> (ours, when it is called)."""
CALLED = (
    "_collect_batch_responses",
    "_handle_abort_req",
    "_init_req_state",
    "_stream_batch_responses",
    "_tokenize_texts",
    "_validate_one_request",
    "_wait_one_response",
    "abort_request",
    "generate_request",
)
"""Methods of SGLang's ``TokenizerManager`` that ours calls."""


def register_hooks(undo: ExitStack) -> None:
    """Hand the table to SGLang's registry, which applies it. ``undo`` takes it back."""
    for target, (ours, when) in HOOKS.items():
        module, _, name = ours.partition(":")
        hook = getattr(import_module(module), name)
        undo.callback(_forget, target, hook)
        HookRegistry.register(target, hook, when)


def _forget(target: str, hook: Any) -> None:
    others = [entry for entry in HookRegistry._hooks.pop(target, []) if entry[1] is not hook]
    if others:
        HookRegistry._hooks[target] = others


def check_hooks() -> None:
    """Raise UnsupportedVersionError naming the functions of SGLang that are not hooked."""
    version = require("sglang")
    unhooked = [target for target in HOOKS if target not in HookRegistry._patched]
    gone = [f"TokenizerManager.{name}" for name in CALLED if not callable(getattr(TokenizerManager, name, None))]
    if missing := [*unhooked, *gone]:
        raise UnsupportedVersionError(
            f"SGLang {version} lacks what mem_triton builds on, or its plugins were not loaded: {', '.join(missing)}. "
            f"Supported: sglang{TESTED_VERSIONS['sglang']}"
        )
