"""``mem-triton serve``: starts an engine's server with memory, by a command that can be printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from mem_triton.runtime.serving_beside import Beside

Text = Optional[str]  # noqa: UP045  typer reads annotations on Python 3.10


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a name on a hub.", show_default=False)],
    more: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[-- OPTIONS...]", help="Options of the engine's own, behind --.", show_default=False),
    ] = None,
    memo: Annotated[Text, typer.Option(help="MeMo's memory model: a LoRA adapter's folder, or URL#MODEL.")] = None,
    memo_executive: Annotated[
        Text, typer.Option(help="The model that asks it, likewise; MODEL itself if left out.")
    ] = None,
    memo_merged: Annotated[
        bool, typer.Option("--memo-merged", help="Merge the adapter into MODEL, and serve that on the next port.")
    ] = False,
    memo_name: Annotated[Text, typer.Option(help="The name under which both are served. [MODEL+memo]")] = None,
    bank: Annotated[Text, typer.Option(help="A bank of texts: its folder.")] = None,
    delta: Annotated[Text, typer.Option(help="An adapter of δ-mem: its folder, or a name on a hub.")] = None,
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A YAML file with a section of the configuration, to which the options are added."),
    ] = None,
    engine: Annotated[Text, typer.Option(help='"vllm" or "sglang"; the one that is installed.')] = None,
    show: Annotated[bool, typer.Option("--print", help="Print the command, and start nothing.")] = False,
) -> None:
    """Start an engine's server with memory.

    The command is vLLM's or SGLang's own; it takes this one's place, so that signals and the exit code are the
    server's. --print shows it. Adapters are checked first: whose base they are of, and their rank. With --memo-merged
    there are two servers, which end together: on a CPU a LoRA adapter costs more than a second model does.
    """
    from mem_triton.cli.settings import folder_of
    from mem_triton.runtime.serving import Serving, engine_of, option_of
    from mem_triton.schema import ConfigError
    from mem_triton.systems.lora_files import check_base, read_adapter_files

    chosen, more = engine_of(engine), more or []
    section: dict[str, Any] = _section(config)
    adapters: dict[str, Path] = {}
    if memo is None and (memo_executive or memo_name or memo_merged):
        raise ConfigError("--memo-executive, --memo-name and --memo-merged need --memo, the memory model")
    beside = _beside(chosen, memo, more) if memo is not None and memo_merged else None
    if memo is not None:
        served = option_of(more, "--served-model-name") or model
        said = {"memory": beside.spec if beside else _served("memo", memo, adapters), "name": memo_name}
        said["executive"] = _served("executive", memo_executive, adapters)
        given = {name: value for name, value in said.items() if value is not None}
        section["memo"] = {"name": f"{served}+memo", "executive": served, **(section.get("memo") or {}), **given}
    for name, (key, value) in {"memory": ("bank", bank), "delta": ("adapter", delta)}.items():
        if value is not None:
            section[name] = {**(section.get(name) or {}), key: value}
    if not section:
        raise ConfigError("nothing to remember with: give --memo, --bank, --delta or --config")
    serving = Serving(chosen, model, section, adapters, more)
    serving.check()
    if beside is not None:
        check_base(read_adapter_files(beside.adapter), model)
    if show:
        typer.echo(beside.printed(serving) if beside else serving.printed())
    elif beside is not None:
        from mem_triton.systems.memo.merging.into_base import merged_once

        merged_once(beside.adapter, folder_of(model), beside.folder)
        raise typer.Exit(beside.run(serving))
    else:
        serving.run()


def _beside(engine: str, memo: str, more: list[str]) -> Beside:
    """The server of the merged memory model, whose folder lies beside the adapter's."""
    from mem_triton.runtime.serving_beside import Beside
    from mem_triton.schema import ConfigError

    if "#" in memo:
        raise ConfigError(f"--memo-merged: merges a LoRA adapter, and --memo {memo} is a model elsewhere")
    adapter = Path(memo)
    return Beside(engine, adapter.with_name(f"{adapter.resolve().name}-merged"), adapter, more)


def _served(name: str, said: str | None, adapters: dict[str, Path]) -> str | None:
    """The name under which the engine serves what was said, None for nothing; an adapter is added to ``adapters``."""
    if said is None or "#" in said:
        return said
    adapters[name] = Path(said)
    return name


def _section(path: Path | None) -> dict[str, Any]:
    """The section in a file, not checked yet: the options may complete it."""
    if path is None:
        return {}
    import yaml

    from mem_triton.schema import ConfigError

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {' '.join(str(error).split())}") from None
    if isinstance(found, dict) and set(found) == {"mem_triton"}:
        found = found["mem_triton"]
    if not isinstance(found, dict):
        raise ConfigError(f"--config {path}: must hold a table of sections, such as memo: {{...}}")
    return found
