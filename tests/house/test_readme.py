"""The README says nothing that is not there: commands, tests, keys, words and files."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from mem_triton.config import DeltaSection, MemorySection, MemTritonConfig, RetrievalSection, parse_config
from mem_triton.systems.request import WORDS, parse_request

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def first_column(header: str) -> list[str]:
    """The code words in the first column of every table whose header starts so."""
    tables = [table.split("\n\n", 1)[0].splitlines()[2:] for table in README.split(f"| {header} |")[1:]]
    return [re.match(r"\| `([^`]+)`", row).group(1) for rows in tables for row in rows]


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert named and named <= targets, named - targets


def test_named_tests_exist():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", README)
    assert len(named) > 10
    for path, name in named:
        functions = {n.name for n in ast.walk(ast.parse((ROOT / "tests" / path).read_text())) if hasattr(n, "name")}
        assert name in functions, f"README names {path}::{name}"


def test_every_row_of_the_compatibility_table_names_a_test():
    rows = README.split("| what | result | test |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    assert rows and all("::test_" in row for row in rows)


def test_every_cell_of_the_engines_table_names_a_test_of_that_engine():
    rows = README.split("| what | vLLM 0.32 | SGLang 0.5.23 |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    assert len(rows) > 10
    for row in rows:
        _, vllm, sglang = row.strip("| ").split(" | ")
        assert re.search(r"`(vllm_engine|demo)/\w+\.py::test_", vllm), row
        assert re.search(r"`sglang_engine/\w+\.py::test_", sglang), row


def test_configuration_table_is_the_schema():
    keys = [name for name in MemTritonConfig.model_fields if name not in ("delta", "memory")]
    keys += [f"delta.{name}" for name in DeltaSection.model_fields]
    keys += [f"memory.{name}" for name in MemorySection.model_fields if name != "retrieval"]
    keys += [f"memory.retrieval.{name}" for name in RetrievalSection.model_fields]
    assert sorted(first_column("key under `mem_triton`")) == sorted(keys)


def test_vocabulary_table_is_the_vocabulary():
    assert sorted(first_column("word")) == sorted(WORDS)


def test_shell_examples_hold_valid_json():
    documents = [json.loads(text) for block in blocks("bash") for text in re.findall(r"'(\{.*?\})'", block, re.DOTALL)]
    sections = [d["mem_triton"] for d in documents if "mem_triton" in d]
    sections += [yaml.safe_load(block) for block in blocks("yaml")]
    requests = [d[field] for d in documents for field in ("vllm_xargs", "custom_params") if field in d]
    assert sections and requests
    for section in sections:
        parse_config(section)
    for words in requests:
        request = parse_request(words)
        assert request.session == "alice" or request.ids


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_parse_and_import_what_exists(code):
    import importlib

    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("mem_triton"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_linked_files_exist():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_drawn_folders_exist():
    drawn = README.split("## The house", 1)[1].split("```")[1]
    folders = [*re.findall(r"^(\w+)/ ", drawn, re.MULTILINE), "integrations"]
    folders += [f"mem_triton/{name}" for name in ("ops", "store", "write", "systems", "runtime", "cli")]
    folders += [f"integrations/{name}" for name in ("mem_triton_vllm", "mem_triton_sglang", "mem_triton_transformers")]
    assert [name for name in folders if not (ROOT / name).is_dir()] == []
