"""The rules of the house: small files, imports that point one way, one style, an environment that speaks up."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INTEGRATIONS = ("vllm", "sglang", "transformers")
ENGINES = {*INTEGRATIONS, *(f"mem_triton_{engine}" for engine in INTEGRATIONS)}
LAYERS = (
    "mem_triton.ops",
    "mem_triton.store",
    "mem_triton.systems.delta_mem",
    "mem_triton.write",
    "mem_triton.runtime",
)
"""Lowest first: a layer imports from those before it, never from those after it."""


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository, untracked ones included, ignored ones not."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in sorted(set(names)) if (ROOT / name).exists()]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def limit(path: Path) -> int | None:
    """Most lines that a file may have."""
    name = path.relative_to(ROOT).as_posix()
    if name.startswith("mem_triton/ops/"):
        return 150 if "kernel" in path.stem else 200
    return 400 if name.startswith(("integrations/", "mem_triton/")) else None


def too_long(path: Path) -> bool:
    allowed = limit(path)
    return allowed is not None and len(path.read_text().splitlines()) > allowed


def test_files_are_short():
    assert [str(path.relative_to(ROOT)) for path in tracked("*.py") if too_long(path)] == []


def test_a_long_file_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for name, lines in (
        ("mem_triton/ops/x/kernels.py", 151),
        ("mem_triton/ops/x/op.py", 201),
        ("integrations/a.py", 401),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("pass\n" * lines)
        assert too_long(path)
        path.write_text("pass\n" * (lines - 1))
        assert not too_long(path)


def test_mem_triton_imports_no_engine():
    for path in tracked("mem_triton/*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & ENGINES, f"{path.relative_to(ROOT)} imports {roots & ENGINES}"


def test_imports_point_one_way():
    for i, layer in enumerate(LAYERS):
        for path in tracked(f"{layer.replace('.', '/')}/*.py"):
            above = [name for name in imports(path) if name.startswith(LAYERS[i + 1 :])]
            assert above == [], f"{path.relative_to(ROOT)} imports {above}"


def test_integrations_do_not_know_each_other():
    for mine, other in itertools.permutations(INTEGRATIONS, 2):
        for path in tracked(f"integrations/mem_triton_{mine}/*.py"):
            assert f"mem_triton_{other}" not in {name.split(".")[0] for name in imports(path)}, path


def of_tests(path: Path) -> list[str]:
    """What a file imports from the tests."""
    return [name for name in imports(path) if name.split(".")[0] == "tests"]


def test_nothing_outside_the_tests_imports_from_them(tmp_path):
    for path in tracked("mem_triton/*.py", "integrations/*.py", "benchmarks/*.py", "scripts/*.py"):
        assert of_tests(path) == [], path
    (tmp_path / "late.py").write_text("def f():\n    from tests.support.models import tiny_model")
    assert of_tests(tmp_path / "late.py")


def test_python_files_annotate_lazily():
    """What an annotation names is then never looked up as a module is imported."""
    without = [
        path.relative_to(ROOT).as_posix()
        for path in tracked("mem_triton/*.py", "integrations/*.py")
        if "kernel" not in path.stem  # Triton reads annotations itself
        and any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in ast.parse(path.read_text()).body)
        and "__future__.annotations" not in imports(path)
    ]
    assert without == []


def test_no_index_address_in_the_repository():
    """Where PyTorch's CPU wheels are is pip's configuration, never ours."""
    address = re.compile(
        r"(index-url|find-links|extra-index)\S*\s*[= ]\s*[\"']?(https?|file)://|whl/cpu", re.IGNORECASE
    )
    files = [path for path in tracked() if path.suffix in {".py", ".md", ".toml", ".sh", ".cfg", ".txt", ""}]
    assert address.search("--extra-index-url https" + "://example.org/simple")
    assert [str(p) for p in files if p != Path(__file__) and address.search(p.read_text(errors="ignore"))] == []


def test_ruff_is_clean():
    ruff = [sys.executable, "-m", "ruff"]
    for command in ("check", "format --check"):
        result = subprocess.run([*ruff, *command.split(), "."], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


SCRIPTS = {
    "environment.sh": ("vllm", "pyproject.toml scripts/environment.sh scripts/environment_common.sh"),
    "environment_sglang.sh": (
        "sglang",
        "pyproject.toml tests/sglang_platform/pyproject.toml scripts/sglang_cpu_requirements.txt "
        "scripts/environment_sglang.sh scripts/environment_common.sh",
    ),
    "environment_triton.sh": ("triton-3.6.0", "scripts/environment_triton.sh scripts/environment_common.sh"),
}
"""Script -> (what its stamp begins with, what it makes an environment from)."""
every = pytest.mark.parametrize("script", SCRIPTS)
of_engines = pytest.mark.parametrize("script", list(SCRIPTS)[:2])  # the third does the same; it takes seconds


def environment_script(script: str, tmp_path: Path, **env: str) -> subprocess.CompletedProcess:
    """One of the scripts without a pip configuration and with ``env``; VENV lies under tmp_path."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    return subprocess.run(
        ["bash", f"scripts/{script}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **kept,
            "VENV": str(tmp_path / "env"),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "TRITON": "3.6.0",
            **env,
        },
    )


def test_fault_versions_another_vllm_lies_over_the_compiled_one(tmp_path):
    """An environment with the Python files of one vLLM, the compiled ones of another, and the other's packages."""
    python = []
    for name in ("base", "over"):
        venv.create(tmp_path / name, symlinks=True, with_pip=False)
        python.append(str(tmp_path / name / "bin" / "python"))
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    base, over = (Path(subprocess.check_output([p, "-c", ask], text=True).strip()) for p in python)
    for path, text in (("vllm/_C.abi3.so", "compiled"), ("vllm/gone.py", ""), ("other.py", "x = 1")):
        (base / path).parent.mkdir(exist_ok=True)
        (base / path).write_text(text)
    wheel = tmp_path / "vllm-9.1.0-cp38-abi3-any.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        for path, text in (
            ("vllm/__init__.py", ""),
            ("vllm/deep/a.py", "y = 2"),
            ("vllm/_C.abi3.so", "for a GPU"),
            ("vllm-9.1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: vllm\nVersion: 9.1.0\n"),
        ):
            files.writestr(path, text)
    lay = [python[1], str(ROOT / "scripts" / "overlay_vllm.py"), str(wheel), python[0]]
    for _ in range(2):  # again over what lies there
        subprocess.run(lay, check=True)
    seen = (
        "import importlib.metadata as m, importlib.util as u, other, vllm.deep.a as a;"
        "print(m.version('vllm'), other.x, a.y, u.find_spec('vllm.gone'), a.__file__)"
    )
    said = subprocess.check_output([python[1], "-c", seen], text=True).split()
    assert said == ["9.1.0+cpu", "1", "2", "None", str(over / "vllm/deep/a.py")]
    assert (over / "vllm/_C.abi3.so").read_text() == "compiled"
    shutil.rmtree(base / "vllm")
    missing = subprocess.run(lay, capture_output=True, text=True)
    assert missing.returncode == 1 and "no compiled vLLM lies there" in missing.stderr


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="with a GPU that vLLM is installed whole")
def test_fault_versions_an_overlay_needs_an_environment_below_it(tmp_path):
    result = environment_script("environment_vllm.sh", tmp_path, VLLM="0.33.0", BASE=str(tmp_path / "none"))
    assert result.returncode == 1 and "run 'make env' first" in result.stderr, result.stderr
    assert not (tmp_path / "env").exists()


@every
def test_without_a_python_the_environment_says_so(tmp_path, script):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "cat", "cut", "sha256sum", "rm", "mkdir"):
        (tools / tool).symlink_to(shutil.which(tool))
    result = environment_script(script, tmp_path, PATH=str(tools), PYTHON="")
    assert result.returncode == 1 and "found no Python 3.11 to 3.13" in result.stderr, result.stderr
    result = environment_script(script, tmp_path, PYTHON="/bin/false")
    assert result.returncode == 1 and "PYTHON=/bin/false is not a Python 3.11 to 3.13" in result.stderr
    assert not (tmp_path / "env").exists()


@of_engines
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a GPU machine needs no CPU wheels")
def test_without_cpu_wheels_the_environment_says_what_to_set(tmp_path, script):
    result = environment_script(script, tmp_path, PYTHON=sys.executable)
    assert result.returncode == 1
    assert "PIP_EXTRA_INDEX_URL" in result.stderr and "CPU wheels" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and "http" not in result.stderr
    assert not (tmp_path / "env" / "mem_triton.stamp").exists()


@every
def test_a_ready_environment_is_left_alone(tmp_path, script):
    """The stamp decides: with the right one nothing runs, with another one the script sets out."""
    engine, sources = SCRIPTS[script]
    if not (shutil.which("nvidia-smi") or engine.startswith("triton")):
        engine += "-cpu"
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").symlink_to("/bin/false")  # any use of it would fail
    wanted = subprocess.run(
        ["bash", "-c", f"cat {sources} | sha256sum | cut -c1-32"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    stamp = tmp_path / "env" / "mem_triton.stamp"
    stamp.write_text(f"{engine} {ROOT} {wanted}")
    result = environment_script(script, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    stamp.write_text(f"{engine} {ROOT} stale")
    assert "setting up" in environment_script(script, tmp_path, PYTHON="/bin/false").stderr


def unformatted(text: str) -> bool:
    """Whether some of a file is kept from the formatter."""
    return "# fmt: " + "skip" in text or "# fmt: " + "off" in text


def test_the_formatter_has_its_way():
    files = {path.relative_to(ROOT).as_posix() for path in tracked("*.py") if unformatted(path.read_text())}
    assert sorted(files) == []
    assert unformatted("x = [\n    1, 2,\n]  # fmt: " + "skip")


ENGINE_ROLES = ("integrations/mem_triton_vllm/", "integrations/mem_triton_sglang/")
"""Both engines may have a class of one name, for one role."""


def twice(files: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Names of classes that stand for several: (file, source text) of each module. An op's classes are its own."""
    found: dict[str, set[str]] = {}
    for name, text in (file for file in files if not file[0].startswith("mem_triton/ops/")):
        place = next((ENGINE_ROLES[0] for engine in ENGINE_ROLES if name.startswith(engine)), name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).add(place)
    return {name: sorted(places) for name, places in found.items() if len(places) > 1}


def test_one_class_has_one_name():
    files = [*tracked("mem_triton/*.py"), *tracked("integrations/*.py")]
    assert twice([(str(path.relative_to(ROOT)), path.read_text()) for path in files]) == {}


def test_a_second_class_of_one_name_would_be_seen():
    one = "class A: pass"
    assert twice([("mem_triton/a.py", one), ("integrations/mem_triton_vllm/b.py", one)])["A"]
    assert twice([(f"{engine}b.py", one) for engine in ENGINE_ROLES]) == {}
