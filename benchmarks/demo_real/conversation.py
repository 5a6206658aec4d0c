"""A conversation: facts are told once, the server is started anew, and they are asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.common.client import Client, user
from benchmarks.quality.scores import says

TOLD = (
    "These are my notes. The locker of Mara Stone is number 47. The dentist of Mara Stone is Doctor Quist. "
    "The cat of Mara Stone is called Biscuit."
)
ASKED = (
    ("What is the number of the locker of Mara Stone?", ("47",)),
    ("Who is the dentist of Mara Stone?", ("Doctor Quist", "Dr. Quist", "Quist")),
    ("What is the cat of Mara Stone called?", ("Biscuit",)),
)
ID = "mara"


@dataclass
class Talk:
    """What was said. answers: for each question, of the stock server and of the one with memory."""

    heard: str = ""
    answers: list[tuple[str, str]] = field(default_factory=list)

    async def tell(self, client: Client) -> None:
        """Tell the facts in a request that is kept, its answer not."""
        self.heard = (await client.chat(user(TOLD), 24, {"mem_capture": ID})).text

    async def ask(self, stock: Client, memory: Client) -> None:
        """Ask each question in a request of its own."""
        for question, _ in ASKED:
            plain = await stock.chat(user(question), 24)
            remembered = await memory.chat(user(question), 24, {"mem_ids": [f"capture:{ID}"]})
            self.answers.append((plain.text, remembered.text))

    def right(self) -> tuple[int, int]:
        """Questions that the stock server and the one with memory answer right."""
        pairs = list(zip(self.answers, ASKED, strict=True))
        return sum(says(a, right) for (a, _), (_, right) in pairs), sum(says(b, right) for (_, b), (_, right) in pairs)
