"""Test-only: lets vLLM's CPU worker run Model Runner V2, with Triton's interpreter in the place of a GPU.

vLLM switches Triton off on CPU unless a Triton backend called "cpu" is active. Put this folder on PYTHONPATH and set
MEM_TRITON_TEST_V2=1; nothing else reads that variable.
"""

import os

if os.environ.get("MEM_TRITON_TEST_V2") == "1":
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    class _ActiveDriver:
        @staticmethod
        def is_active() -> bool:
            return True

    backends["cpu"] = type(next(iter(backends.values())))(compiler=None, driver=_ActiveDriver)
