"""Lets ``import torchvision`` succeed beside torch's CPU build; SGLang imports it for every model.

The index carries torchvision for CUDA only. Beside torch for CPUs its compiled part does not load, and its import stops
where it describes two operators that this part would have declared. They are declared here, just before; nothing
implements them, and text models never call them. ``scripts/environment_sglang.sh`` has each Python of the environment
import this module as it starts (a ``.pth`` file), for SGLang's processes are spawned; it imports nothing until then.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class _DeclareFirst(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torch._mem_triton_torchvision = self.library  # operators live as long as what declared them


sys.meta_path.insert(0, _DeclareFirst())
