"""``python -m benchmarks.rag``: the same questions with the same references, as text in the prompt and as memory."""

from benchmarks.rag.app import main

main()
