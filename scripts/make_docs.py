#!/usr/bin/env python
"""Writes the generated parts of docs/: the configuration, the command line, the metrics and the engine patches.

They lie in the pages between ``<!-- generated: NAME -->`` and ``<!-- end -->``; what stands around them is written by
hand. ``python scripts/make_docs.py`` rewrites them, ``--check`` says which are out of date (exit code 1).
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers"}
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def configuration() -> str:
    """A table for each section of the schema, and one row for each key."""
    from mem_triton.config import MemTritonConfig

    return "\n".join(_sections(MemTritonConfig, ()))


def _sections(model: type, path: tuple[str, ...]) -> Iterator[str]:
    meanings, inner = _meanings(model), []
    title = f"`{'.'.join(path)}`" if path else "Top level"
    yield f"## {title}\n\n{_first_sentence(model)}\n\n| key | type | default | meaning |\n|---|---|---|---|"
    for name, field in model.model_fields.items():
        section = _section_of(field.annotation)
        if section is not None:
            inner.append((section, (*path, name)))
        kind = "section" if section is not None else _type(field.annotation) + _bounds(field.metadata)
        key = ".".join((*path, name))
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        default = "**required**" if field.is_required() else _default(value) if section is None else "its defaults"
        default = "none" if section is not None and value is None else default
        meaning = field.description or meanings.get(name) or _first_sentence(section)
        yield f"| `{key}` | {kind} | {default} | {_cell(meaning)} |"
    yield ""
    for section, where in inner:
        yield from _sections(section, where)


def _section_of(annotation: Any) -> type | None:
    from pydantic import BaseModel

    kinds = [annotation, *get_args(annotation)]
    return next((kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, BaseModel)), None)


def _first_sentence(model: type) -> str:
    return inspect.getdoc(model).split("\n\n")[0].replace("\n", " ").replace("``", "`")


def _meanings(model: type) -> dict[str, str]:
    """Field -> what the class's docstring says of it: ``name: text``, in any order, several on a line."""
    own = [inspect.getdoc(kind) for kind in model.__mro__ if kind.__doc__ and kind.__module__.startswith("mem_triton")]
    text = " ".join(" ".join(told.split("\n\n", 1)[1].split()) for told in own if "\n\n" in told)
    names = "|".join(map(re.escape, model.model_fields))
    parts = re.split(rf"(?:^|(?<=[.;] ))({names}): ", text)
    return {name: said.strip().rstrip(";.") for name, said in zip(parts[1::2], parts[2::2], strict=True)}


def _type(annotation: Any) -> str:
    arguments, origin = get_args(annotation), get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(kind) for kind in arguments if kind is not type(None))
    if str(origin) == "typing.Literal":
        return ", ".join(f'`"{value}"`' for value in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"object of {_type(arguments[0])} to {_type(arguments[1])}"
    return {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}[annotation]


def _bounds(metadata: list[Any]) -> str:
    said = [
        f"{sign} {getattr(m, name)}"
        for m in metadata
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if hasattr(m, name)
    ]
    return ", " + ", ".join(said) if said else ""


def _default(value: Any) -> str:
    if value is None:
        return "none"
    return f"`{str(value).lower()}`" if isinstance(value, bool) else "none" if value == () else f"`{value}`"


def _cell(text: str) -> str:
    parts = " ".join(text.split()).replace("``", "`").replace("|", "\\|").split("`")
    text = "`".join(part.replace("<", "&lt;") if i % 2 == 0 else part for i, part in enumerate(parts))  # no HTML
    text = text[:1].upper() + text[1:] if re.match(r"[a-z][a-z ]", text) else text  # δ-mem and vLLM keep their letters
    return text + ("" if text.endswith((".", ".]")) or not text else ".")


def command_line() -> str:
    """A heading for each command, its help, and a table of its arguments and options."""
    from typer.main import get_command

    from mem_triton.cli.app import app

    return "\n".join(_commands(get_command(app), "mem-triton"))


def _commands(command: Any, name: str) -> Iterator[str]:
    for child in getattr(command, "commands", {}).values():
        if hasattr(child, "commands"):
            yield from _commands(child, f"{name} {child.name}")
            continue
        arguments = [p for p in child.params if p.param_type_name == "argument"]
        usage = " ".join((f"{name} {child.name}", *(p.metavar or p.name.upper() for p in arguments), "[OPTIONS]"))
        told = "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(child.help or "").split("\n\n"))
        yield f"## {name} {child.name}\n\n{told}\n\n```text\n{usage}\n```\n"
        shown = [p for p in child.params if p.name != "help"]
        if shown:
            yield "| argument or option | default | meaning |\n|---|---|---|"
        for parameter in shown:
            option = parameter.param_type_name == "option"
            spelled = ", ".join(f"`{one}`" for one in parameter.opts) if option else f"`{parameter.metavar}`"
            default = parameter.default
            empty = default in (None, "", False, ()) or parameter.required or callable(default)
            shown_default = "**required**" if parameter.required and option else "" if empty else f"`{default}`"
            yield f"| {spelled} | {shown_default} | {_cell(getattr(parameter, 'help', None) or '')} |"
        yield ""


def metrics() -> str:
    """A row for each metric that a front end counts."""
    from prometheus_client import Counter, Gauge, Histogram

    import mem_triton.metrics
    import mem_triton.store.pool.metrics

    kinds = {Counter: "counter", Gauge: "gauge", Histogram: "histogram"}
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for module in (mem_triton.metrics, mem_triton.store.pool.metrics):
        for metric in vars(module).values():
            if kind := kinds.get(type(metric)):
                name = metric._name + ("_total" if kind == "counter" else "")
                labels = ", ".join(f"`{label}`" for label in metric._labelnames)
                rows.append(f"| `{name}` | {kind} | {labels} | {_cell(metric._documentation)} |")
    return "\n".join(rows) + "\n"


def registers(root: Path = ROOT) -> dict[str, Any]:
    """Engine -> its integration's module ``patches``, read from its file: the engine need not be installed."""
    found = {}
    for engine in ENGINES:
        path = root / "integrations" / f"mem_triton_{engine}" / "patches.py"
        spec = importlib.util.spec_from_file_location(f"_register_{engine}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[engine] = module
    return found


def subclasses(engine: str) -> list[tuple[str, str, list[str]]]:
    """(class of an integration, the engine's class that it extends, public methods that it defines)."""
    trees = {
        p.stem: ast.parse(p.read_text()) for p in sorted((ROOT / f"integrations/mem_triton_{engine}").glob("*.py"))
    }
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    classes = [(module, n) for module, tree in trees.items() for n in tree.body if isinstance(n, ast.ClassDef)]
    bases = {n.name: [b.value if isinstance(b, ast.Subscript) else b for b in n.bases] for _, n in classes}

    def extended(name: str) -> str | None:
        for base in bases.get(name, ()):
            if isinstance(base, ast.Name):
                path = imported.get(base.id, "") if base.id not in bases else extended(base.id) or ""
                if path.split(".")[0] == engine:
                    return path
        return None

    found = []
    for module, node in classes:
        if path := extended(node.name):
            methods = [n.name for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
            found.append((f"{module}.{node.name}", path, [m for m in methods if not m.startswith("_")]))
    return found


def engine_patches() -> str:
    """A section for each engine, and an entry for each of its patches."""
    from mem_triton.patches import KINDS

    lines = ["| kind | meaning |", "|---|---|", *(f"| {kind} | {_cell(said)} |" for kind, said in KINDS.items())]
    for engine, register in registers().items():
        patches = register.PATCHES
        counts = ", ".join(f"{sum(p.kind == kind for p in patches)} {kind}" for kind in KINDS)
        lines += ["", f"## {ENGINES[engine]}", "", f"{len(patches)} entries: {counts}.", ""]
        for number, patch in enumerate(patches, 1):
            lines += [f"### {number}. {patch.target}", ""]
            where = sorted({site.split(":")[0] for site in patch.sites})
            lines += [f"- **Kind**: {patch.kind}", f"- **Where**: {', '.join(f'`{one}`' for one in where)}"]
            said = {"What": patch.what, "Why": patch.why, "Upstream": patch.upstream, "Until": patch.until}
            lines += [f"- **{name}**: {text}" for name, text in said.items()] + [""]
        if extended := subclasses(engine):
            lines += ["### Classes that extend the engine's", "", "| class | extends | methods |", "|---|---|---|"]
            for name, base, methods in extended:
                lines.append(f"| `{name}` | `{base}` | {', '.join(f'`{one}`' for one in methods)} |")
            lines.append("")
        lines += ["### Private names that are read or called", "", "| name | what for |", "|---|---|"]
        lines += [f"| `{name}` | {_cell(said)} |" for name, said in register.PRIVATE.items()] + [""]
    return "\n".join(lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "command-line": command_line,
    "metrics": metrics,
    "engine-patches": engine_patches,
}


def pages() -> dict[Path, str]:
    """Page with generated parts -> its text as it should be. Raises KeyError for a part that nothing makes."""
    found = {}
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if BLOCK.search(text):
            found[path] = BLOCK.sub(lambda m: f"{m[1]}\n{BLOCKS[m[2]]().strip()}\n\n{m[3]}", text)
    return found


def main() -> int:
    """Write the pages, or with ``--check`` name those that are out of date."""
    old = [path for path, text in pages().items() if text != path.read_text(encoding="utf-8")]
    for path in old:
        if "--check" in sys.argv[1:]:
            print(f"{path.relative_to(ROOT)} is out of date: run `make docs`")
        else:
            path.write_text(pages()[path], encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return int(bool(old) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
