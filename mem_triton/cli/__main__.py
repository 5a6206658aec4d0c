"""``python -m mem_triton.cli``."""

from mem_triton.cli.app import main

main()
