"""Recall with the evidence only in explicit memory: a table, and JSON under results/::

    python -m benchmarks.recall.explicit --save

Every figure goes through the product: texts are written to a bank on disk with a codec, loaded from it, placed before
the context and read in one softmax (``mem_triton_transformers``). An answer counts if greedy decoding gives exactly
"It is <value>.<|im_end|>". References are 64 to 128 tokens long, with one to four facts about held-out names among
sentences that answer nothing; a third of the facts repeat a name with another attribute, also across references.
Intervals: Wilson, 95 %.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.common import record
from benchmarks.common.statistics import wilson
from benchmarks.recall.evaluate import load
from benchmarks.recall.explicit_world import (
    MOST,
    PQ,
    Librarian,
    Question,
    Shelf,
    chosen_names,
    one_library,
    questions,
    right_answers,
    with_text,
)
from mem_triton.systems.explicit.retrieval import Retriever

HERE = Path(__file__).parent
MODEL = HERE / "model-memory"
CODECS = ("fp32", "bf16", "fp8", "int8", *PQ)
PARTS = ("by_references", "by_codec", "by_facts", "hard")
FACTS = (1, 2, 4, 8)
LIBRARY = 300
Cells = dict[str, list[bool]]


class Evaluation:
    """Fills ``cells``: "<row> / <column>" -> whether each question was answered right. Banks live under ``folder``."""

    def __init__(self, model_folder: Path, folder: Path, sessions: int, seeds: list[int]) -> None:
        self.folder, self.sessions, self.seeds = folder, sessions, seeds
        self.model: PreTrainedModel
        self.tokenizer: PreTrainedTokenizerFast
        self.model, self.tokenizer = load(model_folder)
        self.librarian = Librarian(model_folder, self.model, self.tokenizer)
        self.cells: Cells = {}
        self.retrieved: float | None = None  # share of questions whose right reference is among those retrieved

    def asked(self, **options: Any) -> list[Question]:
        """The questions of all seeds."""
        return [question for seed in self.seeds for question in questions(seed, self.sessions, **options)]

    def shelf(self, group: list[Question], kind: str, codec: str, most: int | None = None) -> Shelf:
        """A bank of the first ``most`` references of all questions."""
        texts = {name: text for question in group for name, text in list(question.texts.items())[:most]}
        return self.librarian.write(self.folder / f"bank-{len(list(self.folder.iterdir()))}", kind, codec, texts)

    def cell(self, name: str, group: list[Question], shelf: Shelf, count: int, where: str = "right") -> None:
        """Ask every question with ``count`` references attached."""
        read = [[shelf.refs[n] for n in chosen_names(question, where, count)] for question in group]
        self.cells[name] = right_answers(
            self.model, self.tokenizer, [question.asked for question in group], read, shelf.bank
        )

    def by_references(
        self, kinds: tuple[str, ...] = ("sparse", "dense", "prefix"), counts: tuple[int, ...] = ()
    ) -> None:
        """One to five references, all but one wrong; only wrong ones; none."""
        group = self.asked()
        for kind in kinds:
            shelf = self.shelf(group, kind, "bf16")
            for count in counts or range(1, MOST + 1):
                self.cell(f"{kind} / {count}", group, shelf, count)
                self.cell(f"{kind}, wrong references only / {count}", group, shelf, count, "wrong")
            shelf.bank.close()
        for count in counts or range(1, MOST + 1):
            asked = [with_text(question, count) for question in group]
            self.cells[f"text in the prompt / {count}"] = right_answers(self.model, self.tokenizer, asked)
        asked = [question.asked for question in group]
        self.cells["no memory / 0"] = right_answers(self.model, self.tokenizer, asked)

    def by_codec(self, kinds: tuple[str, ...] = ("sparse", "dense"), codecs: tuple[str, ...] = CODECS) -> None:
        """Three references, stored in each codec."""
        group = self.asked()
        for kind in kinds:
            for codec in codecs:
                shelf = self.shelf(group, kind, codec, 3)
                self.cell(f"{kind}, 3 references / {codec}", group, shelf, 3)
                shelf.bank.close()

    def by_facts(self, kinds: tuple[str, ...] = ("sparse", "dense"), facts: tuple[int, ...] = FACTS) -> None:
        """Three references with exactly so many facts each."""
        for number in facts:
            group = self.asked(facts=(number, number), references=3)
            for kind in kinds:
                shelf = self.shelf(group, kind, "bf16")
                self.cell(f"{kind}, 3 references of so many facts / {number}", group, shelf, 3)
                shelf.bank.close()

    def hard(self, kinds: tuple[str, ...] = ("sparse", "dense")) -> None:
        """Five references in which most facts share their names with others; and retrieval out of a library."""
        group = self.asked(shared=0.9, references=MOST)
        for kind in kinds:
            shelf = self.shelf(group, kind, "bf16")
            self.cell(f"{kind}, names shared across references / {MOST}", group, shelf, MOST)
            shelf.bank.close()
        for kind in kinds:
            found: list[bool] = []
            hits = 0
            for seed in self.seeds:
                group, texts = one_library(seed, self.sessions, LIBRARY)
                shelf = self.librarian.write(self.folder / f"library-{kind}-{seed}", kind, "bf16", texts)
                retriever = Retriever(shelf.bank, decode=self.tokenizer.decode, top_k=MOST)
                prompts = self.tokenizer([question.asked[0] for question in group])["input_ids"]
                read = [[a.ref for a in retriever.plan(ids)] for ids in prompts]
                hits += sum(shelf.refs[next(iter(q.texts))] in refs for q, refs in zip(group, read, strict=True))
                asked = [question.asked for question in group]
                found += right_answers(self.model, self.tokenizer, asked, read, shelf.bank)
                shelf.bank.close()
            self.cells[f"{kind}, retrieved out of {LIBRARY} / {MOST}"] = found
            self.retrieved = hits / len(found)


def summary(cells: Cells) -> dict[str, dict[str, Any]]:
    """Share, interval and counts of every cell; codecs also with the difference to bf16 on the same questions."""
    report: dict[str, dict[str, Any]] = {}
    for name, right in cells.items():
        report[name] = {
            "recall": sum(right) / len(right),
            "interval": list(wilson(sum(right), len(right))),
            "right": sum(right),
            "asked": len(right),
        }
        row, _, column = name.rpartition(" / ")
        base = cells.get(f"{row} / bf16")
        if base is not None and column != "bf16":
            gained, lost = (sum(a > b for a, b in zip(x, y, strict=True)) for x, y in ((right, base), (base, right)))
            report[name] |= {"points_to_bf16": 100 * (gained - lost) / len(right), "gained": gained, "lost": lost}
    return report


def show(cells: Cells) -> None:
    """One table for each set of columns."""
    rows: dict[tuple[str, ...], dict[str, dict[str, list[bool]]]] = {}
    by_row: dict[str, dict[str, list[bool]]] = {}
    for name, right in cells.items():
        row, _, column = name.rpartition(" / ")
        by_row.setdefault(row, {})[column] = right
    for row, columns in by_row.items():
        rows.setdefault(tuple(columns), {})[row] = columns
    for columns, group in rows.items():
        table = Table("evidence", *columns)
        for row, found in group.items():
            shown = []
            for right in found.values():
                low, high = wilson(sum(right), len(right))
                shown.append(f"{100 * sum(right) / len(right):.1f} ({100 * low:.1f}-{100 * high:.1f})")
            table.add_row(row, *shown)
        Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--sessions", type=int, default=128, help="questions per cell and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[201, 202, 203])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/recall-explicit-<cpu|gpu>-<date>.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    begin = time.time()
    head = record.about("recall with the evidence only in explicit memory", "python -m benchmarks.recall.explicit")
    head["machine"]["threads"] = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        evaluation = Evaluation(args.model, Path(folder), args.sessions, args.seeds)
        for part in args.parts:
            getattr(evaluation, part)()
            print(f"{time.time() - begin:.0f} s: {part}", flush=True)
            if args.save:  # after each part, so that a run that is stopped leaves what it found
                save(evaluation, args, head | {"seconds": round(time.time() - begin)})
    show(evaluation.cells)


def save(evaluation: Evaluation, args: argparse.Namespace, head: dict[str, Any]) -> Path:
    """The result file: every cell, and what is needed to get it again. Later parts of a run take an earlier one's."""
    report = head | {
        "seeds": args.seeds,
        "questions_per_seed": args.sessions,
        "weights_sha256": record.digests(args.model),
        "right_reference_retrieved": evaluation.retrieved,
        "cells": summary(evaluation.cells),
    }
    some = "" if len(args.parts) == len(PARTS) else "-" + "-".join(args.parts).replace("_", "-")
    return record.save(report, f"recall-explicit{some}")


if __name__ == "__main__":
    main()
