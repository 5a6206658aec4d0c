"""Keeps a worker's memory, engine-neutral: what the model reads, and what lies beside its KV cache."""
