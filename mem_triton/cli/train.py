"""``mem-triton train``: a group of commands, each in a file of its own."""

from __future__ import annotations

import typer

from mem_triton.cli import train_cartridge, train_delta, train_memo

app = typer.Typer(no_args_is_help=True, help="Train what a memory system needs.")
app.command("cartridge")(train_cartridge.cartridge)
app.command("delta")(train_delta.delta)
app.command("memo")(train_memo.memo)
