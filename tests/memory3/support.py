"""A model with a real tokenizer, and texts for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

RECALL = Path(__file__).parents[2] / "benchmarks" / "recall" / "model"

TEXT = (
    "The locker of Mara Stone is falcon. The badge of Hugo Park is amber. The desk of Nina Price is cedar. "
    "The laptop of Omar Reed is comet. The ticket of Paula Rivers is ginger. The team of Ruth Scott is raven."
)


@cache
def encoder() -> Any:
    """The recall model's encoder, with its tokenizer."""
    import torch

    from mem_triton_transformers import TransformersEncoder

    torch.set_num_threads(1)
    return TransformersEncoder.load(str(RECALL), device="cpu")


def tokenizer() -> Any:
    return encoder().tokenizer
