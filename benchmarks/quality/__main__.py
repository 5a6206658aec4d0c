"""``python -m benchmarks.quality``: questions about invented documents, answered with the text and with a bank."""

from benchmarks.quality.app import app

app(prog_name="python -m benchmarks.quality")
