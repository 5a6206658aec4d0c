"""These tests run kernels in Triton's interpreter, which must be chosen before triton is imported.

``tests/ops/test_in_interpreter.py`` runs this folder in a process of its own; to run it by hand::

    TRITON_INTERPRET=1 pytest tests/ops/interpreter
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.support import interp

    interp.install()
else:
    collect_ignore_glob = ["test_*.py"]
