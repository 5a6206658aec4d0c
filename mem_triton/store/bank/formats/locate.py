"""Where trained keys and values lie: a folder, a file, or a repository of Hugging Face."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

from mem_triton.store.bank.formats.cartridge import best_name
from mem_triton.store.bank.formats.peft import CONFIG, PICKLED, WEIGHTS
from mem_triton.store.errors import ArtifactError

Form = Literal["auto", "peft", "cartridge"]
FORMS: tuple[Form, ...] = ("auto", "peft", "cartridge")


def locate(source: str, form: Form = "auto", file: str | None = None, revision: str | None = None) -> tuple[Form, Path]:
    """("peft", its folder) or ("cartridge", its file). file: which one of ``source``, if it holds several.

    revision: of a repository. Raises ArtifactError naming the source and what it lacks.
    """
    path = Path(source)
    if path.is_file():
        if file is not None:
            raise ArtifactError(f"--file: {source} is a file itself; leave it out, or give the folder")
        names, folder = [path.name], path.parent
        file = path.name
    else:
        folder = path if path.is_dir() else _fetched(source, form, file, revision)
        if path.is_dir() and revision is not None:
            raise ArtifactError(f"--revision: {source} is a folder, which has none; leave it out")
        names = [entry.name for entry in folder.iterdir()]
    chosen = choose(source, names, form, file)
    target = folder / (file or chosen[1])
    if not target.exists():
        raise ArtifactError(f"--file: {source} has no {file}; it has {_some(names)}")
    return chosen[0], target.parent if chosen[0] == "peft" else target


def choose(source: str, names: Collection[str], form: Form, file: str | None) -> tuple[Form, str]:
    """(form, file) of what a source with these files holds. Raises ArtifactError if it holds neither."""
    if file is not None:
        last = Path(file).name
        kind = "peft" if last in (CONFIG, WEIGHTS, PICKLED) else "cartridge"
        if form not in ("auto", kind):
            raise ArtifactError(f"--file: {file} is no file of {form}; leave out --as or --file")
        return kind, file
    cartridge = best_name(names)
    if form != "cartridge" and CONFIG in names:
        return "peft", CONFIG
    if form != "peft" and cartridge is not None:
        return "cartridge", cartridge
    wanted = {"peft": CONFIG, "cartridge": "cartridge.pt, cache_last.pt or cache-step*.pt"}
    what = wanted.get(form) or f"{wanted['peft']}, {wanted['cartridge']}"
    raise ArtifactError(f"SOURCE: {source} has no {what}; it has {_some(names)}; name a file of another name by --file")


def _fetched(source: str, form: Form, file: str | None, revision: str | None) -> Path:
    """A repository's files, downloaded if need be; no more of them than are read."""
    if source.startswith((".", "/", "~")):
        raise ArtifactError(f"SOURCE: there is no file or folder {source}")
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            names = HfApi().list_repo_files(source, revision=revision)
            _, name = choose(source, names, form, file)
        except (OfflineModeIsEnabled, ConnectionError):
            return Path(snapshot_download(source, revision=revision, local_files_only=True))
        beside = [
            f"{Path(name).parent.as_posix()}/{other}".removeprefix("./")
            for other in (CONFIG, WEIGHTS, PICKLED, "config.yaml")
        ]
        return Path(snapshot_download(source, revision=revision, allow_patterns=[name, *beside]))
    except ArtifactError:
        raise
    except Exception as error:  # a dozen kinds, of several libraries
        raise ArtifactError(
            f'SOURCE: "{source}" is no file or folder, and Hugging Face did not give it: {error}'
        ) from None


def _some(names: Collection[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"
