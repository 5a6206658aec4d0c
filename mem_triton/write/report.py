"""What a write did, and what it could not do."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class WriteReport:
    """What a write did. added, filled: references of new entries, and of cold ones that got their block; skipped: texts
    that were there already; empty: texts that are blank or of which no token may be kept; characters: text that is done
    with. elsewhere: "source: reference" of texts that are there under another id than theirs. problems: texts that were
    not written, each with its source and the reason. removed: references that were taken out; stale: of earlier
    contents of the same files, and still served.
    """

    added: list[str] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)
    skipped: int = 0
    empty: int = 0
    tokens: int = 0
    characters: int = 0
    seconds: float = 0.0
    elsewhere: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
