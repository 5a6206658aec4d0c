"""Explicit memory against text RAG in one run, over HTTP::

    python -m benchmarks.rag --save

Two ``vllm serve`` processes with the same model: a stock one, whose prompts hold the references as text (what RAG does
after retrieval), and one with a bank that holds the same references, whose requests name them. Which references a
question gets is given, so retrieval is on neither side. Every repeat asks new questions with new references: neither
prefix cache nor pool has seen them. The bank is written before; its references are on disk when they are asked for.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.common import record
from benchmarks.common.client import Messages, connected, user
from benchmarks.common.engines import ENGINES, require_packages
from benchmarks.common.running import REST, running
from benchmarks.common.server import BenchmarkError, Server, choose_ports, require_folder, usual_dtype
from benchmarks.common.statistics import median_and_range, wilson
from benchmarks.recall import data
from benchmarks.recall.evaluate import load
from benchmarks.recall.explicit import MODEL
from benchmarks.recall.explicit_world import KINDS, MOST, Librarian, Question, Shelf, chosen_names, questions
from mem_triton.write import prefix_ids

TEXT, MEMORY, NOTHING = "text RAG", "explicit memory", "no evidence"
ENGINE = ENGINES["vllm"]
KV_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Found:
    """What one side did: right answers of ``asked``, and one figure per repeat. ttft in seconds."""

    right: int = 0
    asked: int = 0
    tokens_per_second: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    ttft_alone: list[float] = field(default_factory=list)


@app.command()
def rag(
    requests: Annotated[int, typer.Option(min=1, help="Requests at once, each with 5 references of its own.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Output tokens per request of the speed test.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of the speed test.")] = 5,
    alone: Annotated[int, typer.Option(min=1, help="Requests per repeat that have the server for themselves.")] = 8,
    kind: Annotated[str, typer.Option(help="sparse, dense or prefix.")] = "sparse",
    model: Annotated[Path, typer.Option(help="The model's folder.")] = MODEL,
    dtype: Annotated[str | None, typer.Option(help="The servers' --dtype.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep the figures under benchmarks/results.")] = False,
) -> None:
    """Compare explicit memory with references as text in the prompt of a stock server."""
    console = Console(highlight=False)
    dtype = dtype or usual_dtype()
    head = record.about("explicit memory against text RAG", "python -m benchmarks.rag")
    with tempfile.TemporaryDirectory(prefix="mem_triton-rag-") as folder:
        try:
            require_packages(ENGINE)
            require_folder(model, "config.json", "--model", "model")
            groups = [questions(1000 + repeat, requests + alone, references=MOST) for repeat in range(repeats + 1)]
            stock_model, tokenizer = load(model)
            texts = {name: text for group in groups for q in group for name, text in q.texts.items()}
            shelf = Librarian(model, stock_model, tokenizer).write(Path(folder) / "bank", kind, "bf16", texts)
            shelf.bank.close()
            servers = make_servers(model, dtype, Path(folder), requests)
            with running(servers, console):
                found = asyncio.run(course(servers, groups, shelf, tokens, alone))
        except BenchmarkError as error:
            Console(stderr=True, highlight=False).print(str(error), style="bold red", markup=False)
            raise typer.Exit(1) from None
    read = kv_bytes(stock_model.config, kind, KV_DTYPES[dtype], groups, tokenizer)
    show(console, found, read, head["machine"])
    if save:
        sides = {
            name: vars(side) | {"interval": wilson(side.right, side.asked)} | read.get(name, {})
            for name, side in found.items()
        }
        path = record.save(
            head
            | {
                "servers": [server.shown_command for server in servers],
                "weights_sha256": record.digests(model),
                "kind": kind,
                "dtype": dtype,
                "requests_at_once": requests,
                "tokens_per_request": tokens,
                "sides": sides,
            },
            "rag",
        )
        console.print(f"kept in {path.relative_to(record.ROOT)}")


def make_servers(model: Path, dtype: str, folder: Path, requests: int) -> list[Server]:
    """A stock one, and one with the bank."""
    launch = ENGINE.launch(model, "recall", dtype, max(8, requests))
    section = {"memory": {"bank": str(folder / "bank"), "pool_gib": 0.2}}
    return [
        Server(name, launch, ENGINE.memory(part, folder / "unused"), port, folder / f"{name.replace(' ', '-')}.log")
        for name, part, port in zip((TEXT, MEMORY), (None, section), choose_ports(None), strict=False)
    ]


def as_text(question: Question) -> Messages:
    """The references as text, acknowledged, then the question."""
    told = " ".join(question.texts[name] for name in chosen_names(question, "right", MOST))
    return [*user(told), {"role": "assistant", "content": data.REPLY}, *asked(question)]


def asked(question: Question) -> Messages:
    return user(data.question(question.fact, question.seed))


async def course(
    servers: list[Server], groups: list[list[Question]], shelf: Shelf, tokens: int, alone: int
) -> dict[str, Found]:
    """Speed in turns, every repeat with a group of its own that no server has seen; then recall of all questions."""
    found = {TEXT: Found(), MEMORY: Found(), NOTHING: Found()}

    def request(name: str, question: Question) -> tuple[Messages, dict[str, Any] | None]:
        if name == TEXT:
            return as_text(question), None
        ids = [shelf.refs[n] for n in chosen_names(question, "right", MOST)]
        return asked(question), {"mem_ids": ids} if name == MEMORY else None

    async with connected(servers, len(groups[0]), ENGINE.fields_in) as clients:
        for repeat, group in enumerate(groups):
            turns = list(clients.items())
            for name, client in turns[:: 1 if repeat % 2 == 0 else -1]:
                await asyncio.sleep(REST)
                begin = time.perf_counter()
                together = [request(name, q) for q in group[: len(group) - alone]]
                answers = await asyncio.gather(*(client.chat(m, tokens, w, ignore_eos=True) for m, w in together))
                wall = time.perf_counter() - begin
                single = []
                for messages, fields in (request(name, q) for q in group[len(group) - alone :]):
                    single.append((await client.chat(messages, 1, fields, ignore_eos=True)).ttft)
                if repeat:  # the first one warms up
                    found[name].tokens_per_second.append(sum(a.tokens for a in answers) / wall)
                    found[name].ttft.append(statistics.median(a.ttft for a in answers))
                    found[name].ttft_alone.append(statistics.median(single))
        for name, client in ((TEXT, clients[TEXT]), (MEMORY, clients[MEMORY]), (NOTHING, clients[TEXT])):
            everybody = [(q, request(name, q)) for group in groups for q in group]
            answers = await asyncio.gather(*(client.chat(m, memory=w) for _, (m, w) in everybody))
            found[name].asked = len(answers)
            found[name].right = sum(
                data.is_correct(a.text, q.fact) for a, (q, _) in zip(answers, everybody, strict=True)
            )
    return found


def kv_bytes(
    config: Any, kind: str, size: int, groups: list[list[Question]], tokenizer: Any
) -> dict[str, dict[str, float]]:
    """Mean prompt tokens of each side, and bytes of keys and values that attention reads for the first output token.

    Arithmetic, not a measurement: every token that a layer's KV heads see, twice (keys and values). Memory is counted
    as the bank holds it: ``keep_tokens`` per reference and KV head in its layers, and the constant prefix
    in all of them.
    """
    one = 2 * config.num_key_value_heads * config.head_dim * size  # bytes of one token in one layer
    layers, write = config.num_hidden_layers, KINDS[kind]

    def tokens_of(messages: Messages) -> int:
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    everybody = [question for group in groups for question in group]
    text = statistics.mean(tokens_of(as_text(q)) for q in everybody)
    question = statistics.mean(tokens_of(asked(q)) for q in everybody)
    whole = statistics.mean(sum(len(tokenizer(t)["input_ids"]) for t in q.texts.values()) for q in everybody)
    kept = whole if write.kind == "prefix" or write.keep_tokens is None else MOST * write.keep_tokens
    constant = 0 if write.kind == "prefix" else len(prefix_ids(tokenizer, write.prefix_text))
    memory = len(write.layer_indices(layers)) * kept + layers * constant
    return {
        TEXT: {"prompt_tokens": text, "kv_bytes_per_token": one * layers * text},
        MEMORY: {"prompt_tokens": question, "kv_bytes_per_token": one * (layers * question + memory)},
    }


def show(console: Console, found: dict[str, Found], read: dict[str, dict[str, float]], machine: dict[str, Any]) -> None:
    """One table: a row a side."""
    where = machine["gpu"] or "a CPU: says nothing about a GPU"
    table = Table(
        "evidence",
        "recall [95 %]",
        "prompt tokens",
        "KV read per token",
        "TTFT, ms",
        "TTFT alone, ms",
        "output tokens/s",
        title=f"Explicit memory and text RAG, {MOST} references, on {where}",
        box=box.SIMPLE_HEAD,
    )
    for name, side in found.items():
        low, high = wilson(side.right, side.asked)
        cells = [f"{side.right / side.asked:.1%} [{low:.1%}, {high:.1%}]"]
        if name in read:
            cells += [f"{read[name]['prompt_tokens']:.0f}", f"{read[name]['kv_bytes_per_token'] / 1024:.0f} KiB"]
            cells += [
                "{:.1f} [{:.1f}, {:.1f}]".format(*(1000 * x for x in median_and_range(times)))
                for times in (side.ttft, side.ttft_alone)
            ]
            cells.append("{:.0f} [{:.0f}, {:.0f}]".format(*median_and_range(side.tokens_per_second)))
        table.add_row(name, *cells)
    console.print(table)


def main() -> None:
    """Entry point of ``python -m benchmarks.rag``."""
    app(prog_name="python -m benchmarks.rag")
