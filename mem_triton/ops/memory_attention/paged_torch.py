"""The op on a CPU. STUB: the reference, until the vectorised path stands."""

from __future__ import annotations

from mem_triton.ops.memory_attention import reference


def attend(query, context, out, *, lse=None, **options):
    dtype = options.pop("dtype", None) or __import__("torch").float32
    value, log_sum = reference.memory_attention(query, context, dtype=dtype, **options)
    live = int(context.query_start_loc[-1])
    out[:live] = value[:live].to(out.dtype)
    if lse is not None:
        lse[:live] = log_sum[:live]
