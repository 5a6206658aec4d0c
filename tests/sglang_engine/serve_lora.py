"""SGLang's server on a machine without pinned host memory, which its LoRA asks for: ``python -m`` this module.

Schedulers that are spawned import it again; those that are forked have what it changes already.
"""

from __future__ import annotations

import runpy

from tests.sglang_engine.tamper import no_pinned_memory

no_pinned_memory()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
