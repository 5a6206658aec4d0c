"""mem_triton in transformers: δ-mem and explicit memory on a model that transformers runs.

Example::

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-4B-Instruct-2507")
    apply_mem_triton(model, {"delta": {"adapter": "declare-lab/delta-mem_qwen3_4b-instruct"}})
    model.generate(**told)                        # the memory now holds what was told
    model.generate(**asked)                       # a new context, the same memory
    save_memory(model, "alice.safetensors")
    reset_memory(model)

    encoder = TransformersEncoder(model)          # explicit memory: texts to keys and values for a bank
    with read_plans(model, bank, [[Attachment("paris@1")]]):
        model.generate(**asked)                   # attends to the bank's entry
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError('mem_triton_transformers needs transformers: pip install "mem-triton[hf]"')

from mem_triton_transformers.apply import apply_mem_triton, remove_mem_triton
from mem_triton_transformers.attach import attention_dims
from mem_triton_transformers.encode import TransformersEncoder, UnsupportedModelError
from mem_triton_transformers.explicit import (
    MemorySegment,
    generate_with_retrieval,
    read_memory,
    read_plans,
    segments_of,
)
from mem_triton_transformers.memory import (
    get_memory,
    load_memory,
    reset_memory,
    save_memory,
    set_memory,
    set_memory_write,
    set_write_segments,
)
from mem_triton_transformers.pools import inject, read_pool
from mem_triton_transformers.training import adapter_from, trainable_adapter

__all__ = [
    "MemorySegment",
    "TransformersEncoder",
    "UnsupportedModelError",
    "adapter_from",
    "apply_mem_triton",
    "attention_dims",
    "generate_with_retrieval",
    "get_memory",
    "inject",
    "load_memory",
    "read_memory",
    "read_plans",
    "read_pool",
    "remove_mem_triton",
    "reset_memory",
    "save_memory",
    "segments_of",
    "set_memory",
    "set_memory_write",
    "set_write_segments",
    "trainable_adapter",
]
