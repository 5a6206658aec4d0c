"""Commands with arguments and files that somebody, or a bad disk, has spoilt; seeded, so that a failure comes again."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
import shutil
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from safetensors.torch import load_file, save_file

from mem_triton.cli import main
from tests.support.soak import SECONDS, SEED

WORDS = [
    "",
    "-1",
    "0",
    "1e9",
    "nan",
    "inf",
    "99999999999999999999",
    "-99999999999999999999",
    "null",
    "[]",
    "{}",
    "true",
    "a b",
    "../x",
    "/",
    ".",
    "~",
    "a@1",
    "a@99999999999",
    "a#0",
    "a#*",
    "#",
    "@",
    "é",
    "数",
    "\udcff",
    "half \udcff of it",
    "x" * 300,
    "\x01",
    "--",
    "-",
    "--json",
    "0-99999999999",
    "3-1",
    "1,1",
    "٣",
    "cuda",
    "cuda:99",
    "meta",
    "tpu",
    "float128",
    "openai:ftp://x#y",
    "lexical:big",
    "lexical:99999999999999999999",
    "sentence-transformers:",
    "pq",
    "/dev/null",
    "%s",
    "\n",
]
"""What people, shells and scripts write where something else was wanted."""
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "0",
    [],
    [0],
    [None],
    [[]],
    {},
    {"a": 1},
    "\ud83d",
    [1, 2, 3],
    [-1, 5],
    [0, 10**18],
]
"""What JSON files hold where something else was wanted."""


def spoil_json(data: object, chance: random.Random) -> object:
    """A copy in which one value somewhere is another, is gone, or is there under another name."""
    data = json.loads(json.dumps(data))
    if chance.random() < 0.15 or not isinstance(data, (dict, list)) or not data:
        return chance.choice(VALUES)
    if isinstance(data, list):
        at = chance.randrange(len(data))
        data[at] = spoil_json(data[at], chance)
        return data
    key = chance.choice(sorted(data))
    way = chance.random()
    if way < 0.15:
        del data[key]
    elif way < 0.25:
        data[key + "x"] = data.pop(key)
    elif isinstance(data[key], (dict, list)) and way < 0.7:
        data[key] = spoil_json(data[key], chance)
    else:
        data[key] = chance.choice(VALUES)
    return data


def spoil_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes that are cut off, changed, moved or repeated."""
    if not data:
        return b"\0" * chance.randrange(20)
    way, at = chance.randrange(5), chance.randrange(len(data))
    if way == 0:
        return data[:at]
    if way == 1:
        return data[:at] + bytes(chance.randrange(256) for _ in range(8)) + data[at + 8 :]
    if way == 2:
        return data[:at] + data[at + chance.randrange(1, 64) :]
    if way == 3:
        return data + data[at : at + 100]
    return bytes(chance.randrange(256) for _ in range(chance.randrange(200)))


def spoil_header(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with a spoilt header."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(spoil_json(json.loads(data[8 : 8 + length]), chance)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def spoil(path: Path, chance: random.Random) -> None:
    """Spoil one file in place, mostly in a way that gets past the first check of its kind."""
    data = path.read_bytes()
    if path.suffix == ".json" and chance.random() < 0.8:
        text = json.dumps(spoil_json(json.loads(data), chance))
        path.write_text(text if chance.random() < 0.9 else "[" * 100_000)
    elif path.suffix == ".safetensors" and chance.random() < 0.6:
        path.write_bytes(spoil_header(data, chance))
    else:
        path.write_bytes(spoil_bytes(data, chance))


def spoil_tensor(path: Path, chance: random.Random) -> None:
    """A safetensors file in which one tensor is NaN, of another type, or of another shape."""
    tensors = load_file(path)
    name = chance.choice(sorted(tensors))
    change: Callable = chance.choice([lambda t: t * float("nan"), lambda t: t.int(), lambda t: t[:1], lambda t: t / 0])
    save_file({**tensors, name: change(tensors[name]).contiguous()}, path)


def commands(bank: Path, model: Path, text: Path, folder: Path) -> list[list[str]]:
    """Each command as it works."""
    write = ["write", str(model), str(bank), str(text), "--reference-tokens", "24", "--keep", "8", "--commit", "4"]
    create = ["bank", "create", str(folder / "new"), "--model", str(model)]
    return [
        [*create, "--layers", "0-1", "--keep", "4", "--codec", "fp32"],
        ["bank", "info", str(bank), "--json"],
        ["bank", "list", str(bank), "--tenant", "acme", "--after", "a", "--limit", "5"],
        ["bank", "list", str(bank), "--document", "facts"],
        ["bank", "list", str(bank), "--source", str(text), "--json"],
        ["bank", "search", str(bank), "badge", "--top-k", "3", "--tenant", "acme", "--source", str(text)],
        ["bank", "show", str(bank), "facts#0", "--tenant", "acme"],
        ["bank", "delete", str(bank), "facts#0", "--tenant", "acme"],
        ["bank", "delete", str(bank), "--source", str(text)],
        ["bank", "rename", str(bank), "plain", "other"],
        ["bank", "rename", str(bank), "acme", "umbrella", "--tenant"],
        ["bank", "reindex", str(bank)],
        ["bank", "verify", str(bank)],
        ["bank", "compact", str(bank), "--json"],
        ["bank", "export", str(bank), str(folder / "out.tar"), "--id", "plain", "--tenant", "acme"],
        ["bank", "import", str(bank), str(folder / "good.tar")],
        [*write, "--jsonl-field", "text", "--jsonl-id-field", "id", "--format", "jsonl"],
        [*write, "--id", "x", "--tenant", "acme", "--layers", "0-1", "--context", "reference"],
        [*write, "--device", "cpu", "--dtype", "auto", "--batch-size", "2", "--replace", "--commit-seconds", "1"],
    ]


def spoil_arguments(arguments: list[str], chance: random.Random) -> list[str]:
    """Arguments of which one or two are other words, are gone or are there twice."""
    arguments = list(arguments)
    for _ in range(chance.choice([1, 1, 2])):
        at = chance.randrange(1, len(arguments)) if len(arguments) > 1 else 0
        way = chance.random()
        if way < 0.7:
            arguments[at] = chance.choice(WORDS)
        elif way < 0.85:
            del arguments[at]
        else:
            arguments.insert(at, chance.choice(WORDS))
    return arguments


def copied(source: Path, target: Path) -> Path:
    """A fresh copy of a folder."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


def outcome(arguments: list[str]) -> tuple[int, str, str]:
    """Run a command; its exit code, and what it printed to stdout and stderr."""
    streams = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["mem-triton", *arguments]),
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
        pytest.raises(SystemExit) as end,
    ):
        main()
    return end.value.code, *(stream.getvalue() for stream in streams)


def check(arguments: list[str]) -> int:
    """Run a command; its exit code, which is 0, 1 or 2, and 2 with one line."""
    code, out, err = outcome(arguments)
    assert code in (0, 1, 2) and "Traceback" not in out + err, (arguments, code, err)
    assert "mem-triton: unexpected" not in err, (arguments, err)
    if code == 2 and "Usage:" not in out + err:  # a command without arguments tells how it is used
        lines = err.splitlines()
        assert len([line for line in lines if line.startswith("mem-triton: ")]) == 1, (arguments, err)
        assert lines[-1].startswith("mem-triton: ") and len(lines[-1]) > 20, (arguments, err)
    return code


def soak(run: Callable[[int], int]) -> None:
    """Run seed after seed for the soak's time: other ones each time; a failure prints its seed. run: gives a code."""
    until, codes = time.monotonic() + SECONDS, Counter()
    for seed in itertools.count(SEED):
        try:
            codes[run(seed)] += 1
        except BaseException:
            print(f"MEM_TRITON_SOAK_SEED={seed}")
            raise
        if time.monotonic() > until:
            break
    print(f"soak: seeds {SEED} to {seed}, {dict(codes)}")
    assert codes[0] and codes[2]
