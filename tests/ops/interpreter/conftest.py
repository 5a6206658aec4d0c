"""Only a process that interprets Triton collects this folder; ``tests/ops/conftest.py`` installs the interpreter."""

from tests.support.places import INTERPRETED

if not INTERPRETED:
    collect_ignore_glob = ["test_*.py"]
