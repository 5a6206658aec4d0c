"""Explicit memory against text RAG on a stock server: recall, TTFT, throughput, bytes of KV read per token."""
