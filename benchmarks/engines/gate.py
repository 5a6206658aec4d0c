"""The correctness gate: what an engine answers, against transformers with the same weights and the same memory.

The oracle is given the engine's answers and asked how likely each of their tokens was. In fp32 every token must be the
oracle's own first choice, so the greedy answers are equal, and its log-probability the oracle's to 1e-3. In 16 bits
equal tokens are luck (near ties fall either way); there the error of the log-probabilities may be twice that of the
stock engine, whose answers go through the same gate. And memory must change what the oracle says by more than that:
an engine that dropped its memory could not pass.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.engines.memories import Memory

EXACT = 1e-3  # of log-probabilities in fp32
ROUNDING = 0.02  # room above twice the stock engine's error in 16 bits
LENGTHS, TOKENS = (7, 33, 150), 8
"""Prompts shorter and longer than a page of the KV cache, and greedy tokens of each."""


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its tokens and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Verdict:
    """equal: tokens that are the oracle's first choice, of ``tokens``. error: largest difference of a log-probability;
    budget: what it may be. effect: largest change of one by memory. reason: why the gate is red, empty if it is green.
    """

    equal: int
    tokens: int
    error: float
    budget: float
    effect: float | None
    reason: str = ""

    @property
    def green(self) -> bool:
        return not self.reason

    def as_json(self) -> dict[str, Any]:
        return {"gate": "green" if self.green else "red", **asdict(self)}


class Oracle:
    """transformers with the weights that are served. model: in fp32; exact: whether engines compute in fp32, too."""

    def __init__(self, model: torch.nn.Module, exact: bool) -> None:
        self.model, self.exact, self.stock_error = model, exact, 0.0
        vocab = model.config.vocab_size
        generator = torch.Generator().manual_seed(4)
        self.prompts = [torch.randint(4, min(vocab, 10000), (n,), generator=generator).tolist() for n in LENGTHS]

    def judge(self, answers: Sequence[Answer], memory: Memory) -> Verdict:
        """Whether the engine with ``memory`` answered ``self.prompts`` right. The stock engine comes first."""
        said = torch.tensor([x for answer in answers for x in answer.logprobs])
        chosen, best = self._all_logprobs(answers, memory)
        error, gap, effect = float((chosen - said).abs().max()), best - chosen, None
        if memory.section is None:
            self.stock_error, budget = error, EXACT if self.exact else 0.5
        else:
            if memory.reads:
                effect = float((chosen - self._all_logprobs(answers, None)[0]).abs().max())
            budget = EXACT if self.exact else 2 * self.stock_error + ROUNDING
        return self._verdict(int((gap == 0).sum()), gap.numel(), error, budget, effect, float(gap.max()))

    def _verdict(
        self, equal: int, tokens: int, error: float, budget: float, effect: float | None, gap: float
    ) -> Verdict:
        reason = ""
        if any(x != x for x in (error, gap)):
            reason = "a log-probability is NaN"
        elif error > budget:
            reason = f"log-probabilities differ from transformers' by {error:.2g}, more than {budget:.2g}"
        elif self.exact and equal < tokens:
            reason = f"{tokens - equal} of {tokens} greedy tokens are not transformers'"
        elif gap > 2 * budget:
            reason = f"a token is less likely than the best one by {gap:.2g}"
        elif effect is not None and not effect > 2 * budget:
            reason = f"memory changes log-probabilities by {effect:.2g} only, too little to be seen"
        return Verdict(equal, tokens, error, budget, effect, reason)

    def _all_logprobs(self, answers: Sequence[Answer], memory: Memory | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token of all answers, and of the likeliest one in its place."""
        found = [self._logprobs(p, a.tokens, memory) for p, a in zip(self.prompts, answers, strict=True)]
        return torch.cat([chosen for chosen, _ in found]), torch.cat([best for _, best in found])

    def _logprobs(
        self, prompt: list[int], answer: list[int], memory: Memory | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([prompt + answer])
        with torch.inference_mode(), remembering(self.model, memory):
            logits = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        return logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0], logprobs.max(-1).values


def remembering(model: Any, memory: Memory | None) -> AbstractContextManager[Any]:
    """The model with a memory, within the context."""
    if memory is None or not memory.reads:
        return nullcontext()
    if memory.pools is not None:
        return _with_pools(model, memory)
    if memory.adapter is not None:
        return _with_adapter(model, memory)
    return _with_bank(model, memory)


@contextmanager
def _with_adapter(model: Any, memory: Memory) -> Iterator[None]:
    from mem_triton_transformers import apply_mem_triton, remove_mem_triton

    apply_mem_triton(model, {"delta": {"adapter": str(memory.adapter)}})
    try:
        yield
    finally:
        remove_mem_triton(model)


@contextmanager
def _with_pools(model: Any, memory: Memory) -> Iterator[None]:
    from mem_triton_transformers import apply_mem_triton, read_pool, remove_mem_triton

    apply_mem_triton(model, {"memoryllm": {"pools": str(memory.pools)}})
    try:
        with read_pool(model, ["main"]):
            yield
    finally:
        remove_mem_triton(model)


@contextmanager
def _with_bank(model: Any, memory: Memory) -> Iterator[None]:
    from mem_triton.store.bank import Bank
    from mem_triton.store.pool.plan import Attachment
    from mem_triton_transformers import read_plans

    plan = [Attachment(ref) for ref in memory.bank.refs]
    with Bank.open(memory.bank.path) as bank, read_plans(model, bank, [plan]):
        yield
