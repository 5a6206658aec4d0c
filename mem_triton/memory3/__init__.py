"""Memory³ (arXiv 2407.01178): texts written once as sparse keys and values, read by attention when they fit."""

from mem_triton.memory3.encoder import EncodedText, Encoder

__all__ = ["EncodedText", "Encoder"]
