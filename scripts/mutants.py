"""Takes one safety mechanism away at a time and runs the tests that must notice: each mutant must make one fail.

    .venv/bin/python scripts/mutants.py [NAME ...]

The table is ``mutants.toml``. The mutants live in a temporary worktree of HEAD, with what is changed here besides.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".toml")
FAILED = 1
"""pytest's exit code for tests that ran and failed; any other means that they did not run."""


@dataclass(frozen=True)
class Mutant:
    """One mechanism. file: below the repository. text: what stands there, once. to: what takes its place. tests: what
    pytest is given; one of them must fail."""

    name: str
    file: str
    text: str
    to: str
    tests: list[str]


def mutants() -> list[Mutant]:
    """All of the table."""
    return [Mutant(name, **row) for name, row in tomllib.loads(TABLE.read_text()).items()]


@contextmanager
def worktree() -> Iterator[Path]:
    """A copy of the checkout as it is now, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="mem-triton-mutants-") as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--quiet", "--detach", str(tree), "HEAD")
        try:
            for name in _git("ls-files", "--modified", "--others", "--exclude-standard").splitlines():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, tree / name)
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def run(tree: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit code, and what it printed."""
    env = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'integrations'}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def problem(tree: Path, mutant: Mutant) -> str | None:
    """Why a mutant is not dead; None if a test has failed because of it."""
    path = tree / mutant.file
    whole = path.read_text()
    if whole.count(mutant.text) != 1:
        return f"{mutant.file} has its text {whole.count(mutant.text)} times: bring {TABLE.name} up to date"
    path.write_text(whole.replace(mutant.text, mutant.to))
    try:
        code, printed = run(tree, mutant.tests)
    finally:
        path.write_text(whole)
    if code == FAILED:
        return None
    return "no test noticed" if code == 0 else f"its tests did not run:\n{printed[-2000:]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="mutants of the table; all without")
    names = parser.parse_args(arguments).names
    chosen = [mutant for mutant in mutants() if not names or mutant.name in names]
    alive = 0
    with worktree() as tree:
        code, printed = run(tree, sorted({test for mutant in chosen for test in mutant.tests}))
        if code:
            print(f"the tests fail without a mutant:\n{printed[-3000:]}")
            return 2
        for mutant in chosen:
            why = problem(tree, mutant)
            alive += why is not None
            print(f"{mutant.name}: {'dead' if why is None else f'ALIVE: {why}'}", flush=True)
    print(f"{len(chosen)} mutants, {alive} alive")
    return int(alive > 0)


if __name__ == "__main__":
    raise SystemExit(main())
