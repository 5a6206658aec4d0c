"""Safety mechanisms are missed when they are gone: ``scripts/mutants.toml``."""

from __future__ import annotations

import pytest

from scripts.mutants import ROOT, main, mutants, problem


def test_fault29_the_table_says_what_stands_in_the_code():
    table = mutants()
    assert len(table) > 30
    for mutant in table:
        assert (ROOT / mutant.file).read_text().count(mutant.text) == 1, mutant.name
        for test in mutant.tests:
            path, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / path).read_text(), (mutant.name, test)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fault29_no_mutant_lives(capsys):
    assert main([]) == 0, capsys.readouterr().out


def test_fault29_a_mutant_that_no_test_notices_is_told(tmp_path):
    """Control: a change that changes nothing."""
    (tmp_path / "code.py").write_text("SIZE = 3\n")
    (tmp_path / "test_code.py").write_text("from code import SIZE\n\n\ndef test_size():\n    assert SIZE == 3\n")
    row = {"file": "code.py", "text": "SIZE = 3", "tests": ["test_code.py"]}
    make = type(mutants()[0])
    assert problem(tmp_path, make("same", to="SIZE = 1 + 2", **row)) == "no test noticed"
    assert problem(tmp_path, make("other", to="SIZE = 4", **row)) is None
    assert "did not run" in problem(tmp_path, make("broken", to="SIZE = (", **row))
    assert "0 times" in problem(tmp_path, make("gone", to="", **{**row, "text": "SIZE = 5"}))
    assert (tmp_path / "code.py").read_text() == "SIZE = 3\n"
