"""The fused kernel of memory attention and its launch; it needs Triton."""
