"""What a build asks a generator for, and what it may cost."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from mem_triton.schema import Section

Step = Literal["direct", "indirect", "consolidate", "contain", "surface", "cross", "paraphrase", "unknown"]
STEPS: tuple[Step, ...] = get_args(Step)


class BuildBudget(Section):
    """What a build may cost, all its runs together. A limit that is reached ends the build with what is there.

    requests: to the generator. tokens: of prompts and replies; a call that got no answer counts with its bound.
    cost: in the unit of the prices. prompt_price, completion_price: of a million tokens.
    """

    requests: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    cost: float | None = Field(default=None, gt=0)
    prompt_price: float = Field(default=0.0, ge=0)
    completion_price: float = Field(default=0.0, ge=0)


class BuildSettings(Section):
    """How a build asks. The defaults of temperature, chunks and batches are the paper's.

    skip: steps that are left out. chunk_words, overlap_words: of a document's parts. least_pairs: of a document, for
    its consolidation. group: pairs of one call that checks or rewords. batch: pairs of other documents in one call.
    cross_batches: such calls a document. paraphrases: other wordings of a question; the last is kept for evaluation.
    unknowns: questions a document about names that no document holds. temperature: of steps that write.
    max_tokens: of a reply. call_seconds: of a call; after hedge_seconds a second one is sent. tries: calls of one unit.
    at_once: calls that run together. near: similarity of questions that count as one.
    """

    skip: tuple[Step, ...] = ()
    chunk_words: int = Field(default=6400, ge=50)
    overlap_words: int = Field(default=640, ge=0)
    least_pairs: int = Field(default=3, ge=2)
    group: int = Field(default=20, ge=1, le=100)
    batch: int = Field(default=20, ge=1, le=100)
    cross_batches: int = Field(default=20, ge=1)
    paraphrases: int = Field(default=3, ge=1, le=10)
    unknowns: int = Field(default=4, ge=1, le=50)
    temperature: float = Field(default=1.1, ge=0, le=2)
    max_tokens: int = Field(default=32768, ge=64)
    call_seconds: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    hedge_seconds: float = Field(default=180.0, gt=0, allow_inf_nan=False)
    tries: int = Field(default=3, ge=1, le=10)
    backoff: float = Field(default=1.0, ge=0, le=60)
    at_once: int = Field(default=32, ge=1, le=1000)
    near: float = Field(default=0.85, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**31)
    budget: BuildBudget = BuildBudget()
