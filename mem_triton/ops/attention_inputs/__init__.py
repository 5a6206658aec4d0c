"""What δ-mem does to a layer's fused projection before attention, together with the model's own q/k norm and RoPE."""

from mem_triton.ops.attention_inputs.op import attention_inputs
from mem_triton.ops.attention_inputs.reference import attention_inputs_reference
from mem_triton.ops.attention_inputs.types import HeadInputs

__all__ = ["HeadInputs", "attention_inputs", "attention_inputs_reference"]
