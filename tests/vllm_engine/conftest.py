"""What vLLM's tests compare with."""

from tests.support.bench import bench, lora_bench, prompts

__all__ = ["bench", "lora_bench", "prompts"]
