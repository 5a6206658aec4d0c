"""A worker's half of memory, engine-neutral: what hangs at the model and beside its KV cache."""
