"""δ-mem's gated delta rule: specification, torch scans, and the paged op with its Triton kernels."""

from mem_triton.ops.delta_rule.op import delta_rule_paged
from mem_triton.ops.delta_rule.reference import DeltaRuleInputs, DeltaRuleSpec, activate, delta_rule
from mem_triton.ops.delta_rule.stepwise import scan
from mem_triton.ops.delta_rule.types import StateBatch

__all__ = ["DeltaRuleInputs", "DeltaRuleSpec", "StateBatch", "activate", "delta_rule", "delta_rule_paged", "scan"]
