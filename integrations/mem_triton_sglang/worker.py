"""Attaches memory to a scheduler process's model, and enters SGLang's requests into it.

The runner's model has it as its attribute ``mem_triton``; so has the pool of requests, which says when one leaves. A
request enters with the first batch that processes its tokens; before each forward pass the batch's rows are
written into the device tables that kernels read, on the stream of the forward passes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.runtime_context import get_parallel
from torch import nn

from mem_triton.compat import installation
from mem_triton.config import ConfigError, MemTritonConfig
from mem_triton.ops.memory_attention import Policy
from mem_triton.runtime.worker.memory import BatchMemory
from mem_triton.runtime.worker.modules import attention_modules
from mem_triton.runtime.worker.orders import Orders, order_of
from mem_triton.runtime.worker.rotary import listed_tables
from mem_triton.systems import registry
from mem_triton.systems.base import Capability, WorkerHost
from mem_triton_sglang.attach import attach, check_attention
from mem_triton_sglang.carrier import carried_of, has_carried, is_memory_field
from mem_triton_sglang.configuration import configured
from mem_triton_sglang.context import ContextReader
from mem_triton_sglang.held import give, memory_of
from mem_triton_sglang.layer_io import layers_of
from mem_triton_sglang.places import Places, note
from mem_triton_sglang.shape import shape_of
from mem_triton_sglang.states import DeltaStates

logger = logging.getLogger("sglang.mem_triton")


class SGLangWorkerMemory(BatchMemory):
    """states: recurrent states beside the KV cache, None without a system that has some. context: where requests' own
    keys and values lie.

    policy: of attention; None leaves the way to each step's batch. places: of answers in several requests.
    """

    def __init__(self, context: ContextReader, on_stream: Any = contextlib.nullcontext, policy: Policy | None = None):
        super().__init__()
        self.states: DeltaStates | None = None
        self.context, self.on_stream, self.policy = context, on_stream, policy
        self.places, self.orders = Places(), Orders(self.call)

    @functools.cached_property
    def has_segments(self) -> bool:
        """Whether attention reads more than the context, for some requests."""
        return Capability.SEGMENTS in registry.required(self.parts)

    def before_step(self, batch: Any) -> None:
        """Write the coming forward pass's rows. batch: SGLang's ``ScheduleBatch``."""
        ids = [request.rid for request in batch.reqs]
        with self.lock:
            for request in batch.reqs:
                self._enter(request)
            try:
                first, last = _positions(batch)
            except Exception as error:
                self.skip_step(ids, error)
            else:
                self.begin_step(ids, first, last)

    def end_request(self, request: Any) -> None:
        """A request gives its row back, finished, aborted or retracted; its KV is still where it was."""
        with self.lock, self.on_stream():
            self.leave(request.rid)
            self.places.ended(request)
            self.context.rows.pop(request.rid, None)

    def _enter(self, request: Any) -> None:
        if request.rid in self.context.rows or not has_carried(request.sampling_params):
            return
        self.context.rows[request.rid] = request.kv.req_pool_idx
        self._carry_out(request)
        self.enter(request.rid, lambda: carried_of(request.sampling_params))

    def _carry_out(self, request: Any) -> None:
        """The call that a request brings, before the step that it is in."""
        try:
            if (order := order_of(carried_of(request.sampling_params))) is not None:
                self.orders.run(order)
        except Exception as error:  # said where its memory is entered
            logger.debug("mem_triton: %s brings no call that can be read: %s", request.rid, error)


def _positions(batch: Any) -> tuple[list[int], list[int]]:
    """Per row, the positions of the first and the last token that the coming forward pass processes."""
    if batch.forward_mode.is_decode():
        last = [length - 1 for length in batch.seq_lens_cpu.tolist()]
        return last, last
    first = list(batch.prefix_lens or ())
    return first, [start + count - 1 for start, count in zip(first, batch.extend_lens or (), strict=True)]


def attach_memory(runner: Any, config: MemTritonConfig) -> SGLangWorkerMemory:
    """Give a runner's model the memory that is configured. Raises ConfigError naming what does not fit."""
    if runner.use_mla_backend:
        raise ConfigError("mem_triton does not support multi-head latent attention (MLA): it has no keys by head")
    if not runner.is_generation:
        raise ConfigError("mem_triton does not support embedding models: they do not generate")
    shape, ranks = shape_of(runner.server_args, runner.model_config), own_ranks()
    invariant = config.deterministic or runner.server_args.enable_deterministic_inference
    policy = Policy(batch_invariant=True) if invariant else None
    memory = SGLangWorkerMemory(ContextReader(runner), stream_of(runner), policy)

    def attach_states(adapter: Any, tokens_per_state: int | None, lose: Callable[[BaseException], None]) -> Any:
        memory.states = attach(
            runner.model, shape, adapter, tokens_per_state, runner.page_size, ranks.tp, lose, invariant
        )
        return memory.states.slots

    host = WorkerHost(
        layers=attention_layers(runner.model) if Capability.SEGMENTS in registry.required(config.systems) else (),
        tp_rank=ranks.tp,
        rank=ranks.world,
        device=next(runner.model.parameters()).device,
        lose=memory.lose_step,
        exclusive=memory.exclusive,
        on_stream=memory.on_stream,
        read_kv=memory.context,
        attach_states=attach_states,
        layer_io=functools.partial(layers_of, runner.model, _captures_prompts(runner.server_args)),
        deterministic=invariant,
        chat=True,
    )
    memory.attach(config, shape, host)
    logger.info("memory attached: %s", memory.describe())
    return memory


def _captures_prompts(server_args: Any) -> bool:
    """Whether prompts run in CUDA graphs, whose replays run no hook of a layer."""
    from sglang.srt.arg_groups.overrides import resolved_view

    graphs = resolved_view(server_args).cuda_graph_config
    return graphs is not None and graphs.prefill.backend != "disabled"


def use_frequencies(runner: Any) -> None:
    """Turn by the frequencies that the model's configuration lists, where it lists some. Raises ConfigError."""
    for module, table in listed_tables(runner.model, runner.model_config.hf_text_config.to_dict()):
        module.cos_sin_cache = table


def attention_layers(model: nn.Module) -> list[int]:
    """This rank's attention layers by their index in the model. Raises ConfigError for what memory cannot serve."""
    modules = attention_modules(model, RadixAttention, "memory in attention").values()
    attentions = {module.attn.layer_id: module.attn for module in modules}
    for index, attention in attentions.items():
        check_attention(f"layer {index}", attention, "memory in attention")
    return sorted(attentions)


@dataclass(frozen=True)
class Ranks:
    """tp: this process among those that split heads; world: among all that hold a part of the model."""

    tp: int
    world: int


def own_ranks() -> Ranks:
    """Where this process stands."""
    parallel = get_parallel()
    return Ranks(parallel.attn_tp_rank, parallel.pp_rank * parallel.tp_size + parallel.tp_rank)


def stream_of(runner: Any) -> Any:
    """Enter it to queue work among the forward passes; nothing on a CPU, which has no streams."""
    if torch.device(runner.device).type == "cpu":
        return contextlib.nullcontext
    module = torch.get_device_module(runner.device)
    return lambda: module.stream(runner.forward_stream)


# ---- hooks: called by SGLang's HookRegistry after or before the named functions; without a configuration they return


def after_initialize(result: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    """``ModelRunner.initialize``: weights and LoRA are there, the KV cache is not sized yet."""
    config = configured()
    if config is not None and not runner.is_draft_worker:
        logger.info("%s", installation(__file__))
        use_frequencies(runner)
        give(runner.model, attach_memory(runner, config))


def after_cell_size(result: int, configurator: Any, kvc: Any, num_layers: int) -> int:
    """``DefaultPoolConfigurator._compute_cell_size``: a token takes the bytes of its state, too."""
    memory = memory_of(kvc.model)
    return result + (memory.states.bytes_per_token if memory is not None and memory.states is not None else 0)


def after_alloc(result: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    """``ModelRunner.alloc_memory_pool``: the KV cache is there."""
    memory = memory_of(runner.model)
    if memory is None:
        return
    if memory.states is not None:
        pool = runner.token_to_kv_pool
        memory.states.allocate(pool.size + pool.page_size, pool.device)
    give(runner.req_to_token_pool, memory)
    from mem_triton.runtime.worker.service import serve_memory

    serve_memory(memory, own_ranks().world, memory.orders)


def after_init_new(result: Any, cls: Any, batch: Any, model_runner: Any, **kwargs: Any) -> None:
    """``ForwardBatch.init_new``: runs before each forward pass, on its stream."""
    memory = memory_of(model_runner.model)
    if memory is not None:
        memory.before_step(batch)


def before_free(pool: Any, request: Any) -> None:
    """``ReqToTokenPool.free``: a request leaves, however it ended."""
    memory = memory_of(pool)
    if memory is not None:
        memory.end_request(request)


def after_request(result: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """``Req.__init__``: refuses memory fields that reached the scheduler past the front end."""
    note(request)
    fields = getattr(request.sampling_params, "custom_params", None) or {}
    asked = sorted(filter(is_memory_field, fields))
    if asked and not has_carried(request.sampling_params):
        request.set_finish_with_abort(
            f"{asked[0]}: mem_triton is not active in the process that took this request; send it to the server's own "
            "HTTP port, with one tokenizer worker"
        )
