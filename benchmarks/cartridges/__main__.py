"""``python -m benchmarks.cartridges``: cartridges of several sizes for one document, and how often they answer."""

from benchmarks.cartridges.app import app

app(prog_name="python -m benchmarks.cartridges")
