"""The arguments of memory attention: their types, how a KV cache may be packed, and what is required of them."""
