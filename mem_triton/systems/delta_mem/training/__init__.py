"""Training of δ-mem adapters, as far as it needs no model: conversations, their tokens, and recipes."""
