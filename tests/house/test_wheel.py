"""The wheel, installed outside the repository, works by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.support.checkout import ROOT
from tests.support.models import save_tiny_model


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], Path]:
    """Folder of a fresh environment's commands, its processes' environment and where they run.

    It has the wheel of its own, and this environment's other packages, which are no part of what is tested.
    """
    folder = tmp_path_factory.mktemp("wheel")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = folder / "source"  # a build leaves build/ and *.egg-info behind
    files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file() and name.startswith(
            ("mem_triton/", "integrations/", "pyproject", "README", "LICENSE")
        ):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)], check=True, env=env
    )
    venv.create(folder / "env", symlinks=True, with_pip=False)
    python = folder / "env" / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.check_output(where, text=True).strip())
    (packages / "others.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    (wheel,) = folder.glob("mem_triton-*.whl")
    subprocess.run(
        [*pip, "--python", str(python), "install", "--no-deps", "--force-reinstall", "--ignore-installed", str(wheel)],
        check=True,
        env=env,
    )
    return python.parent, env, folder


def run(outside: tuple[Path, dict[str, str], Path], *command: str) -> subprocess.CompletedProcess[str]:
    bin_folder, env, folder = outside
    return subprocess.run([bin_folder / command[0], *command[1:]], env=env, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_fault_versions_the_wheel_holds_every_package(outside):
    names = ("mem_triton", "mem_triton_vllm", "mem_triton_sglang", "mem_triton_transformers")
    code = f"import importlib.util as u; print(*(u.find_spec(n).origin for n in {names}), sep='\\n')"
    found = [Path(line) for line in run(outside, "python", "-c", code).stdout.split()]
    assert len(found) == 4 and all(path.is_relative_to(outside[2] / "env") for path in found), found
    for name in names:
        folder = ROOT / ("" if name == "mem_triton" else "integrations") / name
        ours = {path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".py", ".json", ".typed")}
        there = next(path.parent for path in found if path.parent.name == name)
        assert {path for path in ours if not (there / path).exists()} == set()


@pytest.mark.slow
def test_fault_versions_the_wheel_writes_a_bank(outside):
    model = save_tiny_model(outside[2] / "model", "qwen3")
    (outside[2] / "notes.txt").write_text("The locker of Mara Stone is falcon.")
    written = run(outside, "mem-triton", "write", str(model), "bank", "notes.txt", "--kind", "prefix", "--quiet")
    assert written.returncode == 0, written.stdout + written.stderr
    listed = run(outside, "mem-triton", "bank", "list", "bank")
    assert listed.returncode == 0 and "notes" in listed.stdout, listed.stdout + listed.stderr
    report = json.loads(run(outside, "mem-triton", "doctor", "--json").stdout)
    assert {v["name"]: v["ok"] for v in report["versions"]}["mem_triton"]


@pytest.mark.slow
def test_fault_versions_the_wheel_is_a_plugin_of_the_engine(outside):
    pytest.importorskip("vllm")
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as f;"
        "import mem_triton_vllm; print(mem_triton_vllm.__file__, f['mem_triton'].__name__)"
    )
    said = run(outside, "python", "-c", code)
    assert said.returncode == 0, said.stderr[-2000:]
    path, loader = said.stdout.split()[-2:]
    assert Path(path).is_relative_to(outside[2] / "env") and loader == "MemTritonLoader"


def test_fault_versions_a_missing_transformers_names_the_extra(tmp_path):
    code = "import sys; sys.modules['transformers'] = None\n"
    alone = code + "import mem_triton_transformers"
    said = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True)
    assert 'ImportError: mem_triton_transformers needs transformers: pip install "mem-triton[hf]"' in said.stderr
    (tmp_path / "notes.txt").write_text("The locker of Mara Stone is falcon.")
    save_tiny_model(tmp_path / "model")
    arguments = ["mem-triton", "write", str(tmp_path / "model"), str(tmp_path / "bank"), str(tmp_path / "notes.txt")]
    command = f"sys.argv = {arguments}; from mem_triton.cli.app import main; main()"
    said = subprocess.run([sys.executable, "-c", code + command], capture_output=True, text=True)
    assert said.returncode == 2 and 'pip install "mem-triton[hf]"' in said.stderr, said.stderr
    assert "Traceback" not in said.stderr
