"""mem_triton: memory for large language models, inside the inference engines that people already run.

Importing this package imports no engine. See README.md for the two-command start, and
``mem_triton_vllm`` and ``mem_triton_transformers`` for the integrations.
"""

__version__ = "0.1.0"
