"""One run of a build in a process of its own, which a test kills: FOLDER SPEC; the texts are in FOLDER/texts.json."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from mem_triton.systems.memo.endpoint import Endpoint
from mem_triton.systems.memo.reflections.ledger import Ledger, SourceText
from mem_triton.systems.memo.reflections.pipeline import Build, export
from mem_triton.systems.memo.reflections.settings import BuildSettings

SETTINGS = BuildSettings(at_once=4, max_tokens=4000, cross_batches=2, backoff=0.01)


async def build(
    folder: Path, spec: str, settings: BuildSettings = SETTINGS, texts: dict[str, str] | None = None
) -> str:
    """Go on with a build and export it; returns why it stopped, "" if it did not."""
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        if texts is not None:
            ledger.add_documents(SourceText(id, f"{id}.md", text) for id, text in texts.items())
        async with Endpoint(spec) as generator:
            stopped = await Build(ledger, generator, settings).run()
        export(ledger, folder, settings)
    finally:
        ledger.close()
    return stopped


if __name__ == "__main__":
    place = Path(sys.argv[1])
    print(asyncio.run(build(place, sys.argv[2], texts=json.loads((place / "texts.json").read_text()))))
