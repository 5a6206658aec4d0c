"""The demo, `make demo`: one small model on three real servers, stock and with memory. ``engines``: vLLM and SGLang."""
