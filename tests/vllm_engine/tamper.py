"""Negative controls: each function switches one safety mechanism off, in the process that calls it."""

from __future__ import annotations


def no_memory_in_cache_keys() -> None:
    from mem_triton_vllm import front_end

    front_end._salt = lambda prompt, key: prompt


def coarse_states_under_speculation() -> None:
    from mem_triton_vllm import attach

    attach._tokens_per_state = lambda vllm_config, section: 16


def one_last_state_only() -> None:
    from mem_triton.runtime import slots

    slots.StateSlots.take = _take_newest


def _take_newest(self, lease: str, position: int):
    """As ``take``, had the tables kept nothing but the newest state."""
    if lease in self._left:
        last, states = self._left.pop(lease)
    else:
        resident = next(r for r in self._residents.values() if r.lease == lease)
        last, states = resident.last_position, self.last[:, resident.slot]
    return position, states[:, last % 2].contiguous().numpy().tobytes()


def attach_before_lora() -> None:
    from mem_triton_vllm import v1_runner
    from mem_triton_vllm.attach import attach

    def prepare(vllm_config, model, section) -> None:
        model.mem_triton_slots = attach(vllm_config, model, section)

    v1_runner.prepare = prepare
