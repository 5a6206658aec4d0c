"""A scripted executive: answers the prompts of the protocol by rules about the invented world, as JSON.

It sees what a model sees, the messages of one call, and remembers nothing.
"""

from __future__ import annotations

import json
import re
from typing import Any

from benchmarks.memo.world import UNKNOWN, ask, hops, stated

Messages = list[dict[str, Any]]


def reply(messages: Messages, schema: str) -> str:
    """The reply to a stage's prompt. schema: the name that the request's response format has."""
    if schema in ("decision", "final_decision"):
        return json.dumps(_compact(messages[1]["content"], last=schema == "final_decision"))
    question, replies, sections = _read(messages[1]["content"])
    return json.dumps(_STAGES[schema](question, replies, sections))


def _read(text: str) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    parts = dict(part.split("\n", 1) for part in re.split(r"\n*^# ", text, flags=re.MULTILINE) if "\n" in part)
    told = [json.loads(line) for line in parts["Replies of the memory model"].splitlines() if line.startswith("{")]
    others = {name: value for name, value in parts.items() if name not in ("Replies of the memory model",)}
    return json.loads(parts["The user's question"]), told, others


def _known(replies: list[dict[str, Any]], name: str, relation: str) -> tuple[str, int] | None:
    for item in replies:
        if (fact := stated(item.get("reply", ""))) is not None and fact[:2] == (name, relation):
            return fact[2], item["number"]
    return None


def _sub(question: str, candidate: str = "") -> dict[str, Any]:
    return {"question": question, "candidate": candidate, "paraphrases": []}


def _grounding(question: str, replies: list[dict[str, Any]], sections: dict[str, Any]) -> dict[str, Any]:
    if (asked := hops(question)) is None:
        return {"clues": [{"clue": question, "value": "low", "questions": [_sub(question)]}], "combined": []}
    name, first, _ = asked
    questions = [_sub(ask(first, name, wording)) for wording in range(2)]
    return {"clues": [{"clue": name, "value": "high", "questions": questions}], "combined": []}


def _pinning(question: str, replies: list[dict[str, Any]], sections: dict[str, Any]) -> dict[str, Any]:
    asked = hops(question)
    found = _known(replies, asked[0], asked[1]) if asked else None
    if found is None:
        return {"candidates": [], "confirmed": "", "decision": "exhaust", "sub_questions": []}
    return {"candidates": [found[0]], "confirmed": found[0], "decision": "continue", "sub_questions": []}


def _seeking(question: str, replies: list[dict[str, Any]], sections: dict[str, Any]) -> dict[str, Any]:
    name, first, second = hops(question) or ("", "", "")
    via = _known(replies, name, first)
    if (
        via is None
        or _known(replies, via[0], second)
        or any(ask(second, via[0]) == item["question"] for item in replies)
    ):
        return {"decision": "answer", "pivot": "", "sub_questions": []}
    return {"decision": "ask", "pivot": "", "sub_questions": [_sub(ask(second, via[0]), via[0])]}


def _synthesis(question: str, replies: list[dict[str, Any]], sections: dict[str, Any]) -> dict[str, Any]:
    if (asked := hops(question)) is None:
        said = next(((item["reply"], item["number"]) for item in replies if item["question"] == question), None)
        return _final(said[0] if said else UNKNOWN, [said[1]] if said else [])
    via = _known(replies, asked[0], asked[1])
    found = _known(replies, via[0], asked[2]) if via else None
    return _final(found[0], [via[1], found[1]]) if via and found else _final(UNKNOWN, [])


def _final(answer: str, evidence: list[int]) -> dict[str, Any]:
    return {"final_answer": answer, "justification": "It follows from the replies.", "evidence": evidence}


_STAGES = {"grounding": _grounding, "pinning": _pinning, "seeking": _seeking, "synthesis": _synthesis}


def _compact(text: str, last: bool) -> dict[str, Any]:
    question = re.search(r"^Question: (.*)$", text, re.MULTILINE)[1]
    known = re.search(r"^Known: (.*)$", text, re.MULTILINE)[1]
    replies = [{"reply": said + ".", "number": i} for i, said in enumerate(known.rstrip(".").split(". "), 1)]
    asked = hops(question)
    if asked is None:
        return (
            {"decision": "answer", "text": known} if known != "nothing yet" else {"decision": "ask", "text": question}
        )
    via = _known(replies, asked[0], asked[1])
    found = _known(replies, via[0], asked[2]) if via else None
    if found:
        return {"decision": "answer", "text": found[0]}
    if last or UNKNOWN.rstrip(".") in known:
        return {"decision": "answer", "text": UNKNOWN}
    return {"decision": "ask", "text": ask(asked[2], via[0]) if via else ask(asked[1], asked[0])}
