"""What the executive and the memory model are asked to reply, as pydantic models and as JSON schemas for engines.

"paper" has a schema a stage; "compact" has one decision a turn, for small executives.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=600)]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
Prose = Annotated[str, StringConstraints(strip_whitespace=True, max_length=4000)]


class Reply(BaseModel):
    """A reply in JSON; unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class SubQuestion(Reply):
    """A question to the memory model. candidate: whom it tests, "" for nobody. paraphrases: other wordings of it."""

    question: Line
    candidate: Annotated[str, StringConstraints(strip_whitespace=True, max_length=200)] = ""
    paraphrases: list[Line] = Field(default_factory=list, max_length=4)


class Clue(Reply):
    """A hint in the user's question. value: how much it narrows down what is looked for."""

    clue: Line
    value: Literal["high", "low"] = "low"
    questions: list[SubQuestion] = Field(min_length=1, max_length=3)


class Grounding(Reply):
    """First questions: by clue, and those that combine two clues of high value."""

    clues: list[Clue] = Field(default_factory=list, max_length=12)
    combined: list[SubQuestion] = Field(default_factory=list, max_length=12)


class Pinning(Reply):
    """A turn that looks for the entity. confirmed: the candidate that is meant, "" while none is sure."""

    candidates: list[Name] = Field(default_factory=list, max_length=20)
    confirmed: Annotated[str, StringConstraints(strip_whitespace=True, max_length=200)] = ""
    decision: Literal["continue", "exhaust"]
    sub_questions: list[SubQuestion] = Field(default_factory=list, max_length=24)


class Seeking(Reply):
    """A turn that looks for the answer. pivot: another candidate to go on with, "" for none."""

    decision: Literal["ask", "answer"]
    pivot: Annotated[str, StringConstraints(strip_whitespace=True, max_length=200)] = ""
    sub_questions: list[SubQuestion] = Field(default_factory=list, max_length=24)


class Synthesis(Reply):
    """The last reply. evidence: numbers of the replies that the answer rests on."""

    final_answer: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4000)]
    justification: Prose = ""
    evidence: list[int] = Field(default_factory=list, max_length=64)


class Decision(Reply):
    """A turn of a small executive: the next question, or the answer."""

    decision: Literal["ask", "answer"]
    text: Line


class FinalDecision(Reply):
    """The last turn of a small executive."""

    decision: Literal["answer"]
    text: Line


class MemoryReply(Reply):
    """What the dialect "paper" asks the memory model for."""

    answer: Annotated[str, StringConstraints(strip_whitespace=True, max_length=2000)]
    reasoning: Prose = ""


@cache
def json_schema(model: type[Reply]) -> dict[str, Any]:
    """The JSON schema of a reply as structured output takes it: no other keys, every key required, no references."""
    made = model.model_json_schema()
    definitions = made.pop("$defs", {})

    def closed(node: Any) -> Any:
        if isinstance(node, list):
            return [closed(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return closed(definitions[node["$ref"].rpartition("/")[2]])
        kept = {key: closed(value) for key, value in node.items() if key not in ("title", "default", "description")}
        if "properties" in node:
            kept["properties"] = {name: closed(value) for name, value in node["properties"].items()}
            kept |= {"additionalProperties": False, "required": list(node["properties"])}
        return kept

    return closed(made)
