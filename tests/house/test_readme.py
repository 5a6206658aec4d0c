"""README and docs say nothing that is not there: commands, tests, keys, fields, paths and names.

A shell block is run here, in a folder with a small model, an adapter and two texts, unless its title says which test
runs it, or what it needs: a GPU, the network, or hours.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mem_triton.config import MemTritonConfig, parse_config
from mem_triton.systems.delta_mem.section import DeltaSection
from mem_triton.systems.explicit.section import MemorySection, RetrievalSection
from mem_triton.systems.memo.protocol.settings import Budget, Temperatures
from mem_triton.systems.memo.section import MemoSection
from mem_triton.systems.memoryllm.section import LongTermSection, MemoryLLMSection
from mem_triton.systems.registry import fields, parse_request
from tests.support.documents import ALL, PAGES, ROOT, blocks, commands, mem_triton

README, COMPATIBILITY = PAGES["README.md"], PAGES["compatibility.md"]
NEEDS = ("needs a GPU", "needs the network", "takes hours")


def first_column(header: str, text: str = ALL) -> list[str]:
    """The code words in the first column of every table whose header starts so."""
    tables = [table.split("\n\n", 1)[0].splitlines()[2:] for table in text.split(f"| {header} |")[1:]]
    return [re.match(r"\| `([^`]+)`", row).group(1) for rows in tables for row in rows]


def test_the_readme_is_short():
    assert len(README.encode()) <= 9000


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", ALL, re.MULTILINE))
    assert named and named <= targets, named - targets


@functools.cache
def names_in(path: Path) -> set[str]:
    """What a file assigns and defines, and what it imports with a star."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    assigned = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            assigned |= names_in(ROOT / (node.module.replace(".", "/") + ".py"))
    return assigned | {n.name for n in nodes if hasattr(n, "name") and isinstance(n.name, str)}


def located(path: str) -> Path | None:
    """A file or folder that a code span names: from the root, or below tests, integrations or mem_triton."""
    bases = (ROOT, ROOT / "tests", ROOT / "integrations", ROOT / "mem_triton")
    return next((base / path for base in bases if any(base.glob(path.rstrip("/")))), None)


def test_named_tests_exist():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", COMPATIBILITY)
    assert len(named) > 10
    for path, name in named:
        assert name in names_in(ROOT / "tests" / path), f"compatibility.md names {path}::{name}"


@pytest.mark.parametrize("page", PAGES)
def test_named_paths_and_functions_exist(page):
    files, folders = r"\w+/[\w./*-]+\.(?:py|md|json|csv|sh)", r"(?:mem_triton|benchmarks|tests|integrations)/[\w/-]+"
    spans = re.findall(rf"`({files}|{folders})(?:::(\w+))?`", PAGES[page])
    for path, name in spans:
        place = located(path)
        assert place is not None, f"{page} names {path}"
        if name:
            assert name in names_in(place), f"{page} names {path}::{name}"


def test_every_row_of_the_compatibility_table_names_a_test():
    rows = COMPATIBILITY.split("| what | result | test |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    assert rows and all("::test_" in row for row in rows)


def test_every_cell_of_the_engines_table_names_a_test_of_that_engine():
    rows = COMPATIBILITY.split("| what | vLLM 0.32 | SGLang 0.5.23 |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    assert len(rows) > 10
    for row in rows:
        _, vllm, sglang = row.strip("| ").split(" | ")
        assert re.search(r"`(vllm_engine|demo)/\w+\.py::test_", vllm), row
        assert re.search(r"`sglang_engine/\w+\.py::test_", sglang), row


def test_configuration_table_is_the_schema():
    keys = list(MemTritonConfig.model_fields)
    keys += [f"delta.{name}" for name in DeltaSection.model_fields]
    keys += [f"memory.{name}" for name in MemorySection.model_fields]
    keys += [f"memory.retrieval.{name}" for name in RetrievalSection.model_fields]
    keys += [f"memoryllm.{name}" for name in MemoryLLMSection.model_fields]
    keys += [f"memoryllm.ltm.{name}" for name in LongTermSection.model_fields]
    keys += [f"memo.{name}" for name in MemoSection.model_fields]
    keys += [f"memo.budget.{name}" for name in Budget.model_fields]
    keys += [f"memo.temperatures.{name}" for name in Temperatures.model_fields]
    told = [key for key in first_column("key | type | default", PAGES["configuration.md"]) if "tenants." not in key]
    assert sorted(told) == sorted(keys)


def test_vocabulary_table_is_the_vocabulary():
    assert sorted(first_column("field", PAGES["request-fields.md"])) == sorted(fields())


def test_every_metric_is_told_and_no_other():
    told = set(first_column("metric", PAGES["metrics.md"]))
    named = {name for name in re.findall(r"`(mem_triton:\w+)", ALL)}
    assert told and {name for name in named if name not in told and f"{name}_total" not in told} == set()


def test_shell_examples_hold_valid_json():
    shell = "\n".join(content for _, content in blocks("bash"))
    documents = [json.loads(text) for text in re.findall(r"'(\{.*?\})'", shell, re.DOTALL)]
    sections = [d["mem_triton"] for d in documents if "mem_triton" in d]
    sections += [yaml.safe_load(content) for _, content in blocks("yaml")]
    requests = [d[field] for d in documents for field in ("vllm_xargs", "custom_params") if field in d]
    assert sections and requests
    for section in sections:
        parse_config(section)
    for asked in requests:
        request = parse_request(asked)
        assert request.systems["delta"].session == "alice" or request.systems["memory"].ids


@pytest.mark.parametrize(("title", "code"), blocks("python"))
def test_python_examples_parse_and_import_what_exists(title, code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("mem_triton"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("language", ["bash", "python"])
def test_titles_say_what_runs_a_block(language):
    """The README of a checkout has no other way to say that a command cannot be run here."""
    for title, content in blocks(language):
        if title and title not in NEEDS:
            path = re.fullmatch(r"run by (tests/[\w/]+\.py)", title)
            assert path and (ROOT / path[1]).exists(), f"{title!r} above {content[:60]!r}"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with what the examples name: a BANK, MODEL, ADAPTER, PREFIX, CARTRIDGE, CONVERTED, and texts."""
    from peft import CartridgeConfig

    from mem_triton.systems.delta_mem import save_adapter
    from tests.support import trained
    from tests.support.models import random_adapter, save_tiny_model, tiny_model

    folder = tmp_path_factory.mktemp("examples")
    save_tiny_model(folder / "MODEL")
    config = folder / "MODEL" / "tokenizer_config.json"  # as tokenizers of the served families say
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"model_input_names": ["input_ids", "attention_mask"]})
    )
    save_adapter(random_adapter(tiny_model()), folder / "ADAPTER")
    prefix = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    trained.save_adapter(folder / "PREFIX", folder / "MODEL", prefix)
    keys, values = trained.chance_cache(trained.load_model(folder / "MODEL"), 8)
    trained.save_cartridge(folder / "CARTRIDGE" / "cartridge.pt", keys, values)
    mem_triton(folder, ["convert", "memoryllm", str(ROOT / "tests/data/memoryllm/adapters"), "CONVERTED"])
    (folder / "notes.md").write_text("The key of the east door is with Hugo.\n")
    (folder / "facts.jsonl").write_text('{"id": "contract", "text": "The contract ends in May."}\n')
    mem_triton(folder, ["write", "MODEL", "BANK", "notes.md", "--kind", "prefix", "--quiet"])
    return folder


@functools.cache
def help_of(*words: str) -> str:
    """Of a module, or of a command of it."""
    wide = {**os.environ, "COLUMNS": "300"}
    ask = [sys.executable, "-m", *words, "--help"]
    result = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, env=wide)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_line(folder: Path, line: str) -> None:
    """One command: run, or of what runs for minutes the options, or of make that the target can be planned."""
    words = shlex.split(line, comments=True)
    if words[0] == "mem-triton":
        mem_triton(folder, words[1:])
    elif words[0] == "make":
        assert subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True).returncode == 0, line
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        options = [word for word in words[3:] if word.startswith("--")]
        unknown = [option for option in options if option not in help_of(words[2])]
        if unknown and not words[3].startswith("--"):
            unknown = [option for option in unknown if option not in help_of(*words[2:4])]
        assert unknown == [], line
    else:
        pytest.fail(f"nothing runs `{line}`: give its block a title")


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if blocks("bash", text)])
def test_shell_examples_run(page, place, capsys):
    for title, content in blocks("bash", PAGES[page]):
        if not title:
            for line in commands(content):
                run_line(place, line)
        elif title == "takes hours":  # at least nothing in it is misspelt
            for line in commands(content):
                if line.startswith("mem-triton"):
                    assert f"## {' '.join(line.split()[:2])}" in PAGES["command-line.md"], line
                else:
                    run_line(place, line)


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if blocks("python", text)])
def test_python_examples_run(page, place, monkeypatch):
    monkeypatch.chdir(place)
    for title, content in blocks("python", PAGES[page]):
        if not title:
            exec(compile(content, page, "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page):
    folder = ROOT if page.isupper() or page in ("README.md", "CONTRIBUTING.md") else ROOT / "docs"
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", PAGES[page])
    assert [link for link in links if not (folder / link).exists()] == []


def test_results_that_are_named_exist():
    kinds = "engines|kernels|recall|rag|demo|bank|quality|waiting|rival|train-step"
    named = set(re.findall(rf"`(?:benchmarks/results/)?((?:{kinds})-[\w-]+\.json)`", ALL))
    assert len(named) > 5 and [name for name in named if not (ROOT / "benchmarks" / "results" / name).exists()] == []


def test_drawn_folders_exist():
    drawn = PAGES["architecture.md"].split("```")[1]
    folders = [*re.findall(r"^(\w+)/ ", drawn, re.MULTILINE), "integrations"]
    folders += [f"mem_triton/{name}" for name in ("ops", "store", "write", "systems", "runtime", "cli")]
    folders += [f"integrations/{name}" for name in ("mem_triton_vllm", "mem_triton_sglang", "mem_triton_transformers")]
    assert [name for name in folders if not (ROOT / name).is_dir()] == []
