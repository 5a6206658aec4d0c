"""What the user asked for, from ``MEM_TRITON_CONFIG``, and what SGLang's own arguments have to say about it.

SGLang has no channel for a plugin's options, so the configuration is a file that an environment variable names: spawned
processes inherit it. Arguments are resolved in the main process before any other starts; there everything is checked.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mem_triton.config import ConfigError, MemTritonConfig, load_config
from mem_triton.systems import registry
from mem_triton.systems.base import Capability
from mem_triton_sglang.names import BACKEND, VARIABLE

logger = logging.getLogger("sglang.mem_triton")

PAGE_SIZE = 16
"""Tokens of a KV page unless the user says otherwise: δ-mem keeps one state a page, 0.39 % of Qwen3-4B's KV."""
MAX_REQUESTS = 1024
"""Running requests unless the user says otherwise: every one has a row in memory's tables."""


def configured() -> MemTritonConfig | None:
    """The checked configuration, or None if memory is not asked for. Raises ConfigError."""
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    config = load_config(Path(path))
    if not config.systems:
        known = ", ".join(registry.systems())
        raise ConfigError(f"{path}: no memory is configured; give it one or more of {known}, or unset {VARIABLE}")
    return config


def register_resolution(undo: ExitStack) -> None:
    """Hang our checks and defaults into the resolution of SGLang's arguments (its own extension point).

    ``undo`` takes them out again.
    """
    from sglang.srt.arg_groups.resolution_hooks import _HOOKS, register_resolution_hook

    for step, ours in (
        ("handle_cuda_graph_config", _before_graphs),
        ("handle_attention_backend_compatibility", _after_backends),
        ("handle_other_validations", _validate),
    ):
        register_resolution_hook(step)(ours)
        undo.callback(_HOOKS[step].remove, ours)


def _before_graphs(server_args: Any, previous: Any) -> None:
    config = configured()
    if _is_asked(server_args):
        _refuse(server_args, config)
    if config is not None and Capability.STATE in registry.required(config.systems):
        _declare(
            server_args,
            "cuda_graph_backend_prefill",
            "disabled",
            "states look at each prefill's requests, which a captured prefill cannot; decoding keeps its graphs",
        )
    previous(server_args)


def _after_backends(server_args: Any, previous: Any) -> None:
    previous(server_args)
    if not _is_asked(server_args):
        return
    if _resolved(server_args).page_size is None:
        _declare(server_args, "page_size", PAGE_SIZE, "memory works on pages of the KV cache")
    if _resolved(server_args).max_running_requests is None:
        _declare(server_args, "max_running_requests", MAX_REQUESTS, "every running request has a row in its tables")


def _validate(server_args: Any, previous: Any) -> None:
    previous(server_args)
    if not _is_asked(server_args):
        return
    from mem_triton.runtime.channel import make_folder
    from mem_triton.runtime.incidents import make_file
    from mem_triton_sglang.hooks import check_hooks

    check_hooks()
    _refuse(server_args, configured())  # again: SGLang may have chosen some by itself
    make_folder()  # the processes that are started next find both
    make_file()


def _refuse(server_args: Any, config: MemTritonConfig | None) -> None:
    needs = frozenset() if config is None else registry.required(config.systems)
    for what, (present, why) in _refusals(_resolved(server_args), needs).items():
        if present:
            raise ConfigError(f"mem_triton does not support {what}: {why}")


def _refusals(cfg: Any, needs: Collection[Capability]) -> dict[str, tuple[bool, str]]:
    """SGLang options under which memory would be wrong: what they are, whether they are on, and why."""
    from sglang.srt.environ import envs

    moves = "it moves keys and values without the states and the references that belong to them"
    one_front_end = "one front end has to decide what lies in memory; leave it at 1"
    return {
        "--tokenizer-worker-num above 1": (cfg.tokenizer_worker_num > 1, one_front_end),
        "--dp-size above 1": (cfg.dp_size > 1, one_front_end),
        "--smg-grpc-mode": (
            bool(cfg.smg_grpc_mode or cfg.grpc_mode),
            "its requests bypass the front end that opens their memory; --grpc-port's do not",
        ),
        "SGLANG_RUST_SERVER": (
            envs.SGLANG_RUST_SERVER.get(),
            "its requests bypass the front end that opens their memory; unset the variable",
        ),
        "--grpc-port beside a chat model of a memory system (memo)": (
            cfg.grpc_port is not None and Capability.CHAT in needs,
            "its requests bypass the handler that answers for the chat model, and would be the base model's",
        ),
        "--nnodes above 1": (cfg.nnodes > 1, "its front end reaches the workers of one machine"),
        "speculative decoding": (
            cfg.speculative_algorithm is not None,
            "a rejected draft would stay in the state, and drafts would be checked without memory",
        ),
        "context parallelism (--attn-cp-size, --dcp-size)": (
            max(cfg.attn_cp_size or 1, cfg.dcp_size or 1) > 1,
            "it spreads one sequence over ranks, and memory belongs to the whole sequence",
        ),
        "--enable-unified-memory and --enable-hisparse": (
            bool(cfg.enable_unified_memory or cfg.enable_hisparse),
            "a slot of their KV cache is not the place of one token",
        ),
        "--enable-hierarchical-cache": (bool(cfg.enable_hierarchical_cache), moves),
        "--enable-lmcache": (bool(getattr(cfg, "enable_lmcache", False)), moves),
        "prefill-decode disaggregation": (cfg.disaggregation_mode not in (None, "null"), moves),
        "--enable-two-batch-overlap": (
            bool(cfg.enable_two_batch_overlap),
            "its two half batches would share one set of tables",
        ),
        "--enable-pdmux": (bool(cfg.enable_pdmux), "its two streams would share one set of tables"),
        "--decode-attention-backend or --prefill-attention-backend of another kind": (
            {cfg.decode_attention_backend, cfg.prefill_attention_backend} - {None, BACKEND} != set(),
            "both phases read memory; leave the two options out",
        ),
    }


def _is_asked(server_args: Any) -> bool:
    """Whether this engine is one with memory. Raises ConfigError if the flag is missing."""
    asked = bool(os.environ.get(VARIABLE))
    if asked and server_args.attention_backend != BACKEND:
        raise ConfigError(
            f"{VARIABLE} is set, but --attention-backend is {server_args.attention_backend}: "
            f"add --attention-backend {BACKEND}, or unset {VARIABLE}"
        )
    return asked


def _resolved(server_args: Any) -> Any:
    from sglang.srt.arg_groups.overrides import resolving_view

    return resolving_view(server_args)


def _declare(server_args: Any, field: str, value: Any, why: str) -> None:
    from sglang.srt.arg_groups.overrides import declare_resolution

    asked = getattr(_resolved(server_args), field)
    if asked == value:
        return
    option = "--" + field.replace("_", "-")
    if asked is not None:
        logger.warning("%s is %s instead of %s: %s", option, value, asked, why)
    else:
        logger.info("%s is %s: %s", option, value, why)
    declare_resolution(server_args, BACKEND, **{field: value})
