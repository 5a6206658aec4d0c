"""MemoryLLM (arXiv 2402.04624): pools of hidden rows in every layer; texts are written into them, requests read."""
