"""Files of ``torch.save``, read without running what is in them.

A pickle is a program. Only ``torch.load(weights_only=True)`` is used, which builds tensors and plain containers, and no
class but those that the caller names; the first other one is refused by its name.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mem_triton.store.errors import ArtifactError

FETCH_AGAIN = "it is no file of torch.save, or is cut off: fetch it again"


def load_pickled(file: Path, classes: Sequence[type] = ()) -> dict[str, Any]:
    """The dict that a file holds, its tensors on the CPU. classes: those that may be built besides tensors.

    Raises ArtifactError for anything else, naming the first class that is not among them.
    """
    try:
        with zipfile.ZipFile(file) as packed:  # truncated ones have no directory; a squeezed one could hold terabytes
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in packed.infolist()):
                raise ArtifactError(f"{file}: is compressed, which torch.save does not do; save it again")
        with torch.serialization.safe_globals(list(classes)):
            allowed = {f"{kind.__module__}.{kind.__qualname__}" for kind in classes}
            strange = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - allowed
            if strange:
                raise ArtifactError(
                    f"{file}: holds an object of class {min(strange)}, which is not built; save tensors alone"
                )
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except ArtifactError:
        raise
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise ArtifactError(f"{file}: {_first_line(error)}; {FETCH_AGAIN}") from None
    except (LookupError, TypeError, AttributeError, AssertionError, MemoryError, RecursionError) as error:
        raise ArtifactError(f"{file}: {type(error).__name__}: {_first_line(error)}; {FETCH_AGAIN}") from None
    if not isinstance(loaded, dict):
        raise ArtifactError(f"{file}: holds {type(loaded).__name__}, expected a dict of tensors; save it again")
    return loaded


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
