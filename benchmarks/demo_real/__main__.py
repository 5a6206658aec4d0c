"""``python -m benchmarks.demo_real``: SmolLM2-135M-Instruct reads documents as text and as memory."""

from benchmarks.demo_real.app import main

main()
