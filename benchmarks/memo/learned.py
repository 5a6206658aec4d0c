"""Memory models that learn rows, each once, and how many held-out answers a model gives exactly."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.server import BenchmarkError
from benchmarks.common.statistics import wilson
from benchmarks.memo.corpora import Row, lines, relations_of, row, strangers
from benchmarks.memo.wordings import WORDINGS
from benchmarks.memo.world import UNKNOWN, World
from mem_triton.systems.memo.training.rows import TRAIN, read_rows

FACTS_OF_A_UNIT = 14
"""Two people with five facts each and a company with four."""
AT_A_TIME = 16


def world_of(facts: int, seed: int) -> World:
    """A world of about so many facts. Raises BenchmarkError for more than there are names for."""
    units = round(facts / FACTS_OF_A_UNIT)
    if not 1 <= units <= 70:
        raise BenchmarkError(f"--facts {facts}: a world has from 14 to 980 facts")
    return World(seed, 2 * units, units)


def parts_of(world: World, first: float) -> tuple[list[str], list[str]]:
    """The world's names in two parts, people and companies in the same share. first: of the first part."""
    one: list[str] = []
    other: list[str] = []
    for person in (True, False):
        names = [name for name in world.facts if (" " in name) == person]
        cut = round(first * len(names))
        one += names[:cut]
        other += names[cut:]
    return one, other


def facts_of(world: World, names: Iterable[str]) -> int:
    """How many facts there are about these names."""
    return sum(len(world.facts[name]) for name in names)


def fact_rows(world: World, names: Iterable[str]) -> list[Row]:
    """Every fact about the names in each wording that training never shows."""
    return [
        row(wording.format(n=name), world.sentence(name, relation))
        for name in names
        for relation in world.facts[name]
        for wording in WORDINGS[relation][1]
    ]


def stranger_rows(world: World) -> list[Row]:
    """Questions about names that training never shows."""
    _, _, people, firms = strangers(world)
    names = (*people[:10], *firms[:5])
    return [row(WORDINGS[r][0][0].format(n=name), UNKNOWN) for name in names for r in relations_of(name)]


@dataclass(frozen=True)
class School:
    """Trains adapters of one model and keeps them. model: its folder. cache: where they lie. options: of training."""

    model: Path
    cache: Path
    options: tuple[str, ...]

    def learn(self, rows: Iterable[Row], *more: str) -> tuple[Path, dict[str, Any]]:
        """The adapter that has learned the rows, and training's report. more: options of this one.

        One that was trained before is not trained again; a training that was stopped goes on.
        """
        text, options = lines(rows), [*self.options, *more]
        digest = hashlib.sha256(json.dumps([text, options]).encode()).hexdigest()[:12]
        folder = self.cache / digest
        told = folder / "report.json"
        if not told.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TRAIN).write_text(text, encoding="utf-8")
            command = [sys.executable, "-m", "mem_triton.cli", "train", "memo", str(folder / TRAIN)]
            command += [str(folder / "adapter"), "--model", str(self.model), *options, "--json"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise BenchmarkError(f"training {folder} failed, see above; the same command goes on")
            told.write_text(done.stdout, encoding="utf-8")
        return folder / "adapter", json.loads(told.read_text(encoding="utf-8"))


class Examiner:
    """Asks a model with an adapter, and counts the answers that greedy decoding gives exactly, token for token."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def exact(self, adapter: Path, rows: Sequence[Row]) -> dict[str, Any]:
        """Rows, those answered exactly, and the 95 % Wilson interval of their share."""
        from peft import PeftModel

        model = PeftModel.from_pretrained(self.model, str(adapter)).eval()
        try:
            right = sum(sum(self._right(model, rows[i : i + AT_A_TIME])) for i in range(0, len(rows), AT_A_TIME))
        finally:
            self.model = model.unload()
        return {"rows": len(rows), "exact": right, "interval": [round(one, 4) for one in wilson(right, len(rows))]}

    @torch.inference_mode()
    def _right(self, model: Any, rows: Sequence[Row]) -> list[bool]:
        from mem_triton_transformers.memo_training.packing import IGNORED, padded, tokens_of

        tokens = [tokens_of(self.tokenizer, one, 1024) for one in as_rows(rows)]
        inputs = padded(tokens, self.tokenizer.pad_token_id or 0)
        labels = inputs.pop("labels")[:, 1:]
        said = model(**inputs).logits[:, :-1].argmax(-1)
        return ((said == labels) | (labels == IGNORED)).all(1).tolist()


def as_rows(rows: Sequence[Row]) -> list[Any]:
    """Rows as training reads them."""
    from mem_triton.systems.memo.training.rows import row_of

    return [row_of(one, "held out") for one in rows]


def rows_in(path: Path) -> list[Row]:
    """The rows of a build's file, to train on together with others."""
    return [row(list(one.messages), one.answer) for one in read_rows(path)]
