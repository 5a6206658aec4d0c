"""``python -m benchmarks.kernels``: what our operations cost, beside their floors and what others offer."""

from benchmarks.kernels.app import main

main()
