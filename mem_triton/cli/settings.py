"""From words on the command line to the write path's choices, and to new banks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mem_triton.store.bank import Bank, fingerprint
from mem_triton.store.bank.embedders import embedder_from
from mem_triton.store.bank.fingerprint import Fingerprint, model_fingerprint
from mem_triton.store.bank.spec import EXACT_CODECS
from mem_triton.write import WriteConfig, bank_spec
from mem_triton.write.config import PARALLEL
from mem_triton.write.head import chat_head, reads_sparse_references


class OptionError(ValueError):
    """An option that means nothing; the message names it."""


def folder_of(model: str) -> Path:
    """The model's own files: a local folder, or the Hugging Face cache's."""
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise OptionError(f"MODEL: there is no folder {model}")
    try:
        return fingerprint.model_folder(model, tokenizer=True)
    except Exception as error:  # a dozen kinds, of several libraries
        raise OptionError(f'MODEL: "{model}" is no folder, and Hugging Face did not give it: {error}') from None


def layers_of(words: str) -> str | tuple[int, ...]:
    """ "first_half", "all", or indices and spans of them: "0-17", "4,5,9"."""
    if words in ("first_half", "all"):
        return words
    indices: list[int] = []
    for part in words.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise OptionError(f'--layers: {output_of(words)} is not "first_half", "all", or like "0-17" or "4,5,9"')
        first, last = match[1], match[2] or match[1]
        if max(len(first), len(last)) > 4:  # no model has so many; a range of them would fill the memory
            raise OptionError(f"--layers: {output_of(part)} is more layers than any model has")
        indices += range(int(first), int(last) + 1)
    return tuple(indices)


def output_of(text: str, longest: int = 40) -> str:
    """What somebody wrote, in a message: quoted, and not without end."""
    return repr(text if len(text) <= longest else text[:longest] + "…")


def check_encoding(dtype: str, device: str | None) -> None:
    """Raises OptionError for a precision or a device that torch does not have here."""
    import torch

    known = ("auto", "float32", "bfloat16", "float16")
    if dtype not in known:
        raise OptionError(f"--dtype: {dtype!r} is not one of {', '.join(known)}")
    if device is None:
        return
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OptionError(f"--device: {device!r} cannot be used here: {reason}") from None


def check_embedder(embedder: str) -> None:
    """Raises EmbedderError for one that is unknown or not well written; does not load or call it."""
    if not re.fullmatch(r"sentence-transformers:.+|openai:https?://[^#]+#.+", embedder):
        embedder_from(embedder)


def keep_of(words: str) -> int | None:
    """Tokens kept, None for "all"."""
    if words == "all":
        return None
    if not (words.isascii() and words.isdecimal()) or len(words) > 9 or int(words) < 1:
        raise OptionError(f'--keep: {output_of(words)} is neither a number of tokens nor "all"')
    return int(words)


RAW = "raw"
"""The value of --head for references that are encoded under the BOS token alone."""


def kind_of(folder: Path, kind: str | None, *of_sparse: Any) -> str:
    """The kind of a new bank: what was said, else what the model was trained for. Raises HeadError.

    of_sparse: options that sparse references alone have; one that was given asks for them.
    """
    if kind is not None:
        return kind
    sparse = any(option is not None for option in of_sparse) or reads_sparse_references(folder)
    return "memory3" if sparse else "parallel"


def head_of(folder: Path, kind: str, head: str | None, system: str | None) -> str | None:
    """The text under which references of a new bank are encoded; None for what the kind has by itself.

    head: of --head, None for the chat template's own. system: a system prompt for it. Raises OptionError, HeadError.
    """
    said = "--head" if head is not None else "--system" if system is not None else None
    if kind != "parallel":
        if said:
            raise OptionError(f'{said}: is for kind "parallel", not for "{kind}"')
        return None
    if head is not None and system is not None:
        raise OptionError("--system: goes into the chat template's own head; leave out --head")
    if head is not None:
        return "" if head == RAW else head
    found = chat_head(tokenizer_of(folder), system)
    if found is None and system is not None:
        raise OptionError("--system: the model has no chat template; give the whole head by --head")
    return found or ""


def tokenizer_of(folder: Path) -> Any:
    """The model's tokenizer, by transformers. Raises OptionError if it cannot be loaded."""
    import importlib

    try:
        return importlib.import_module("transformers").AutoTokenizer.from_pretrained(folder)
    except ImportError as error:
        raise ImportError(f'a chat template needs transformers ({error}): pip install "mem-triton[hf]"') from None
    except Exception as error:  # whatever transformers makes of a damaged tokenizer
        raise OptionError(f"MODEL: {folder} cannot be loaded: {type(error).__name__}: {error}") from None


def write_config(base: WriteConfig | None = None, **given: Any) -> WriteConfig:
    """``base`` with the options that were given (those not None). Raises OptionError naming the first bad one."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if "layers" in chosen:
        chosen["layers"] = layers_of(chosen["layers"])
    if "keep" in chosen:
        chosen["keep_tokens"] = keep_of(chosen.pop("keep"))
    if "prefix_text" in chosen:
        chosen["prefix_text"] = chosen["prefix_text"] or None
        try:
            (chosen["prefix_text"] or "").encode()
        except UnicodeEncodeError:
            raise OptionError(f"--prefix-text: {output_of(chosen['prefix_text'])} is no UTF-8 text") from None
    own = base.model_dump() if base else dict(PARALLEL) if chosen.get("kind") == "parallel" else {}
    longest = chosen.get("reference_tokens")
    if own.get("overlap_tokens") and base is None and isinstance(longest, int):
        own["overlap_tokens"] = min(own["overlap_tokens"], max(longest, 0) // 8)
    try:
        return WriteConfig(**{**own, **chosen})
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]).replace("_", "-") if problem["loc"] else ""
        name = {"keep-tokens": "keep"}.get(name, name)
        message = problem["msg"].removeprefix("Value error, ")
        raise OptionError(f"--{name}: {message}, got {output_of(str(problem['input']))}" if name else message) from None


def new_bank(path: Path, model: str, config: WriteConfig, *, codec: str = "auto", embedder: str = "lexical") -> Bank:
    """An empty bank for a model, open for writing. codec: "auto" is the model's own precision."""
    return create_bank(path, model_fingerprint(folder_of(model)), config, codec=codec, embedder=embedder)


def create_bank(
    path: Path,
    made_of: Fingerprint,
    config: WriteConfig,
    *,
    codec: str,
    embedder: str,
    codec_state: bytes | None = None,
) -> Bank:
    """``new_bank`` for a fingerprint that is known. Raises OptionError naming an option that does not fit."""
    codec = EXACT_CODECS.get(made_of.dtype, "bf16") if codec == "auto" else codec
    check_embedder(embedder)
    if made_of.dtype not in EXACT_CODECS:
        raise OptionError(f"MODEL: its dtype is {output_of(made_of.dtype)}, a bank takes {', '.join(EXACT_CODECS)}")
    try:
        spec = bank_spec(config, made_of, codec=codec, embedder=embedder)
    except ValidationError as error:
        problem = error.errors()[0]
        where = f"--{problem['loc'][0]}: " if problem["loc"] else ""
        raise OptionError(where + problem["msg"].removeprefix("Value error, ")) from None
    return Bank.create(path, spec, codec_state)
