"""trl's supervised fine-tuning, imported without a trace in the environment.

``import trl`` sets ``VLLM_LOGGING_LEVEL`` to ERROR (``trl/_compat.py``): every vLLM that this process or its children
start later would be silent, our warnings included.
"""

from __future__ import annotations

import os

_LEVEL = "VLLM_LOGGING_LEVEL"

_before = os.environ.get(_LEVEL)
try:
    from trl import SFTConfig, SFTTrainer
finally:
    os.environ.pop(_LEVEL, None)
    if _before is not None:
        os.environ[_LEVEL] = _before

__all__ = ["SFTConfig", "SFTTrainer"]
