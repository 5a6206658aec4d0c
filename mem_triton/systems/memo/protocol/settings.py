"""What a run of the protocol may cost, and how it asks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mem_triton.schema import Section

TEMPLATE_TOKENS = 256
"""Tokens that a chat template may add to a call's messages; part of the upper bound of what a call costs."""
LONGEST_QUESTION = 8000
"""Bytes of a question to the protocol."""
PROMPT_BYTES = 6000
"""Bytes that a prompt of ours adds to question and history at most, the schema of the reply included."""


class Budget(Section):
    """What one question may cost. Every limit is hard, retries count, and the call of the last stage is held back.

    pinning_turns: turns of the executive that look for the entity.
    seeking_turns: turns of the executive that look for the answer.
    executive_calls: requests to the executive model, repeated ones included.
    memory_calls: requests to the memory model, repeated ones included.
    prompt_tokens: prompt tokens of all calls; a call is counted by its bytes until the server says its tokens.
    completion_tokens: generated tokens of all calls; a call is counted by its limit until the server says its tokens.
    seconds: time of the whole run. A quarter of it, at most 30 seconds, is kept for the last stage.
    """

    pinning_turns: int = Field(default=7, ge=0, le=100)
    seeking_turns: int = Field(default=8, ge=1, le=100)
    executive_calls: int = Field(default=40, ge=1)
    memory_calls: int = Field(default=200, ge=1)
    prompt_tokens: int = Field(default=1_000_000, ge=1)
    completion_tokens: int = Field(default=100_000, ge=1)
    seconds: float = Field(default=180.0, gt=0, allow_inf_nan=False)

    @property
    def last_seconds(self) -> float:
        """Seconds that are kept for the last stage."""
        return min(30.0, self.seconds / 4)


class Temperatures(Section):
    """Sampling temperatures by stage; the defaults are those of the authors' evaluation scripts.

    grounding: of the executive's first questions.
    pinning: of its turns that look for the entity.
    seeking: of its turns that look for the answer.
    synthesis: of its answer.
    memory_grounding: of the memory model's replies to first questions.
    memory_pinning: of its replies while the entity is looked for.
    memory_seeking: of its replies while the answer is looked for.
    """

    grounding: float = Field(default=0.4, ge=0, le=2)
    pinning: float = Field(default=0.4, ge=0, le=2)
    seeking: float = Field(default=1.0, ge=0, le=2)
    synthesis: float = Field(default=0.3, ge=0, le=2)
    memory_grounding: float = Field(default=0.1, ge=0, le=2)
    memory_pinning: float = Field(default=0.1, ge=0, le=2)
    memory_seeking: float = Field(default=0.3, ge=0, le=2)


GREEDY = Temperatures(**dict.fromkeys(Temperatures.model_fields, 0.0))


class Settings(Section):
    """How the protocol asks, and what it may cost.

    dialect: of memory calls. "plain" sends the bare question; "paper" puts an instruction before it and asks for JSON.
    executive_schema: "paper" has grounding, pinning, seeking and synthesis; "compact" one decision a turn.
    instructed: the compact schema's task is told; an executive that was trained on its turns needs no words for it.
    rules: "strict" counts ignorance in a row and compares questions by their words; "paper" counts as the authors do.
    votes: wordings of each sub-question that are asked; the most frequent answer counts.
    ungrounded: the executive may answer where the memory model knew nothing.
    dead_end: times that a question is asked without being known, before it is not asked again.
    retries: repetitions of a call that failed and may succeed.
    backoff: seconds before the first repetition; doubled for each further one.
    call_seconds: time of one call.
    executive_tokens: generated tokens of one executive call.
    memory_tokens: generated tokens of one memory call.
    questions: most sub-questions of one turn.
    history_bytes: bytes of replies that an executive's prompt repeats; older ones are left out first.
    seed: of the first call; each call has the next one.
    """

    dialect: Literal["plain", "paper"] = "plain"
    executive_schema: Literal["paper", "compact"] = "paper"
    instructed: bool = True
    rules: Literal["strict", "paper"] = "strict"
    votes: int = Field(default=1, ge=1, le=5)
    ungrounded: bool = False
    dead_end: int = Field(default=3, ge=1)
    retries: int = Field(default=2, ge=0, le=10)
    backoff: float = Field(default=0.5, ge=0, le=60)
    call_seconds: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    executive_tokens: int = Field(default=2048, ge=16)
    memory_tokens: int = Field(default=256, ge=1)
    questions: int = Field(default=24, ge=1, le=200)
    history_bytes: int = Field(default=16000, ge=500)
    seed: int = Field(default=0, ge=0, lt=2**31)
    temperatures: Temperatures = Temperatures()
    budget: Budget = Budget()

    @model_validator(mode="after")
    def _check_last_stage(self) -> Settings:
        """The call that ends a run has to fit, whatever the question."""
        if self.budget.completion_tokens < self.executive_tokens:
            raise ValueError(
                f"budget.completion_tokens {self.budget.completion_tokens} leaves no room for the last answer; give at "
                f"least executive_tokens, {self.executive_tokens}"
            )
        if self.budget.prompt_tokens < self.last_prompt_tokens:
            raise ValueError(
                f"budget.prompt_tokens {self.budget.prompt_tokens} leaves no room for the last prompt; give at least "
                f"{self.last_prompt_tokens}, or lower history_bytes"
            )
        return self

    @property
    def last_prompt_tokens(self) -> int:
        """Upper bound of the last call's prompt tokens: a token is at least a byte."""
        return LONGEST_QUESTION + self.history_bytes + PROMPT_BYTES + TEMPLATE_TOKENS
