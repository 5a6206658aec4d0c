"""The demo, `make demo`: one small model on two real vLLM servers, stock and with memory."""
