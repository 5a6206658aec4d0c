"""Conversations that teach an adapter of a real chat model to recall facts: train.jsonl and held-out.jsonl::

    python -m benchmarks.recall_real.conversations OUT

Facts about people, in the language of ``benchmarks.recall.data``, told in one request and asked for in another. Names
of held-out sessions occur in no training session. Some requests stay open, for the model's own reply; others have a
reply of a small stock. Chats that tell nothing, all answered by the model itself, show what must stay as it is.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from benchmarks.recall import data

STAGES = ((1, 16), (1, 128), (2, 128), (4, 128), (8, 128))
"""Facts of a session, and values that they may have."""
TELLING = (
    "{name}'s {attribute} is {value}.",
    "The {attribute} of {name} is {value}.",
    "For {name} the {attribute} is {value}.",
    "Note that {name}'s {attribute} is {value}.",
)
OPENINGS = ("Remember this.", "Please remember:", "Keep in mind:", "For later:", "")
ASKING = (
    "What is {name}'s {attribute}?",
    "What is the {attribute} of {name}?",
    "Tell me the {attribute} of {name}.",
    "Which {attribute} does {name} have?",
)
ANSWER = "The {attribute} of {name} is {value}."
STOCK = (
    "Noted.",
    "I will remember that.",
    "Thank you for letting me know.",
    "Got it.",
    "Okay, I have noted that.",
    "Thank you for sharing this information with me. I'll keep it in mind.",
    "I'll make sure to remember that. Is there anything else you'd like me to know?",
)
OPEN = 0.06
"""Share of telling requests that the model answers itself."""
TOPICS = (
    "the sea",
    "bread",
    "volcanoes",
    "chess",
    "bicycles",
    "the moon",
    "coffee",
    "bees",
    "trains",
    "rain",
    "mountains",
    "music",
    "winter",
    "libraries",
    "gardens",
    "bridges",
    "honey",
    "maps",
    "clocks",
    "rivers",
    "cats",
    "airplanes",
    "photography",
    "salt",
    "glass",
    "tea",
    "forests",
    "computers",
    "paper",
    "football",
    "dreams",
    "markets",
)
PLAIN = (
    "Write two sentences about {topic}.",
    "Explain {topic} to a child.",
    "Give me three facts about {topic}.",
    "Why do people like {topic}?",
    "Write a short poem about {topic}.",
)


def message(role: str, content: str) -> dict[str, str]:
    """One message of a chat."""
    return {"role": role, "content": content}


def telling(rng: random.Random, facts: list[data.Fact]) -> str:
    """The user's message that tells facts."""
    opening = rng.choice(OPENINGS)
    return " ".join([*([opening] if opening else []), *(rng.choice(TELLING).format(**vars(fact)) for fact in facts)])


def facts_of(rng: random.Random, count: int, values: int, pool: list[tuple[int, int]]) -> list[data.Fact]:
    """Facts whose values are among the first so many."""
    facts = data.draw(rng, count, pool, shared=1 / 3)
    return [data.Fact(fact.name, fact.attribute, rng.choice(data.VALUES[:values])) for fact in facts]


def session(rng: random.Random, stage: int, pool: list[tuple[int, int]], open_share: float = OPEN) -> dict[str, Any]:
    """A row: facts told in one request, or two, and one asked for."""
    count, values = STAGES[stage]
    facts = facts_of(rng, count, values, pool)
    cut = rng.randrange(1, count) if count > 1 and rng.random() < 0.3 else count
    requests = []
    for part in (facts[:cut], facts[cut:]):
        if part:
            reply = [] if rng.random() < open_share else [message("assistant", rng.choice(STOCK))]
            requests.append([message("user", telling(rng, part)), *reply])
    fact = rng.choice(facts)
    question = rng.choice(ASKING).format(**vars(fact))
    requests.append([message("user", question), message("assistant", ANSWER.format(**vars(fact)))])
    group = f"{count} fact{'s' * (count > 1)}" + (f", {values} values" if values < 128 else "")
    return {"requests": requests, "stage": stage, "group": group}


def plain(topics: tuple[str, ...]) -> list[dict[str, Any]]:
    """Chats that tell nothing; the model answers them itself."""
    return [{"messages": [message("user", form.format(topic=topic))]} for topic in topics for form in PLAIN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=1500, help="training sessions of each stage")
    parser.add_argument("--held-out", type=int, default=32, help="held-out sessions of each stage")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    stages = range(len(STAGES))
    rows = {
        "train": [session(rng, s, data.TRAINED) for s in stages for _ in range(args.rows)] + plain(TOPICS[:26]),
        # held-out sessions are answered by the model itself throughout, as a server's are
        "held-out": [session(rng, s, data.HELD_OUT, 1.0) for s in stages for _ in range(args.held_out)]
        + plain(TOPICS[26:]),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, some in rows.items():
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
        print(f"{path}: {len(some)} conversations")


if __name__ == "__main__":
    main()
