"""Negative controls: each function switches one safety mechanism off, in the process that calls it."""

from __future__ import annotations


def no_memory_in_cache_keys() -> None:
    from mem_triton_vllm import front_end

    front_end._salt = lambda prompt, key: prompt


def coarse_states_under_speculation() -> None:
    from mem_triton_vllm import attach

    attach._tokens_per_state = lambda vllm_config, wanted: 16


def attach_before_lora() -> None:
    from mem_triton_vllm import v1_runner
    from mem_triton_vllm.worker import attach_memory

    def prepare(vllm_config, model, config) -> None:
        model.mem_triton = attach_memory(vllm_config, model, config, block_row=None)

    v1_runner.prepare = prepare


class SameStepRead(BaseException):
    """Ends the engine: whatever is an ``Exception`` costs the requests concerned their memory and no more."""


def watch_same_step_reads() -> None:
    """Not a control but a watch: raise if a row starts from a cell that another row writes in the same step."""
    from mem_triton_vllm.state_cache import DeltaStateCache

    stock = DeltaStateCache.step

    def step(self, projections, gate_bias, reads, metadata) -> None:
        block_size = self.kv_cache.shape[2] * self.tokens_per_state
        starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        written, read = {}, {}
        for row, length in enumerate(lengths):
            done = length - (starts[row + 1] - starts[row])
            blocks = metadata.block_table[row].tolist()
            if done == length:
                continue
            if done:
                read[row] = blocks[(done - 1) // block_size]
            for position in range(done, length):
                written[blocks[position // block_size]] = row
        for row, block in read.items():
            if written.get(block, row) != row:
                raise SameStepRead(f"row {row} reads block {block}, which row {written[block]} writes in this step")
        stock(self, projections, gate_bias, reads, metadata)

    DeltaStateCache.step = step


def same_step_hits_allowed() -> None:
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    from mem_triton_vllm.kv_spec import StatefulFullAttentionManager

    watch_same_step_reads()
    StatefulFullAttentionManager.get_num_blocks_to_allocate = FullAttentionManager.get_num_blocks_to_allocate


def no_memory_in_block_keys() -> None:
    from mem_triton_vllm import block_keys

    block_keys.memory_keys = lambda carried, start, end: (("mem_triton", ()),)


def show_code() -> None:
    """Not a control: the code that torch's compiler makes is printed."""
    import torch

    torch._logging.set_logs(output_code=True)


def show_code_as_on_a_gpu() -> None:
    """Not a control: the same, wired as on a GPU."""
    from tests.support.kernels_on_cpu import as_on_a_gpu

    show_code()
    as_on_a_gpu()


def captures_of_other_blocks() -> None:
    from mem_triton_vllm import v1_runner

    stock = v1_runner._block_rows
    v1_runner._block_rows = lambda runner: lambda request_id: stock(runner)(request_id) + 5


def adapters_loaded_in_the_step() -> None:
    """An adapter counts as what its files hold when a request that names it is admitted; workers load it later."""
    from mem_triton.systems.lora import files_of
    from mem_triton_vllm import adapters

    def to_load(loras, prompt, lora) -> None:
        if lora is not None and not loras.knows(lora.lora_int_id):
            loras.loaded(lora.lora_int_id, lora.lora_path, files_of(lora.lora_path))

    adapters.to_load = to_load
