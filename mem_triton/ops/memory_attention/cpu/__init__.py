"""Memory attention on a CPU. Nothing here imports numba before a row is attended: see ``dispatch``."""
