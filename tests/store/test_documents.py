"""Entries by name, version and document: what is the newest again, what a document's references are, and renaming."""

from __future__ import annotations

import pytest

from mem_triton.store.bank import Bank, BankError, ForeignTenantError, UnknownEntryError, documents, writing
from mem_triton.store.bank.documents import reference_id, resolve_all
from tests.store.bank_case import entry, equal, spec


@pytest.fixture
def bank(tmp_path):
    with Bank.create(tmp_path / "bank", spec()) as bank:
        yield bank


def add_document(bank: Bank, name: str, starts: list[int], **fields) -> list[str]:
    entries = [
        entry(
            reference_id(name, f"{997 * start % 1009:012x}"),
            start,
            f"{name} at {start}",
            metadata={"start": start},
            **fields,
        )
        for start in starts
    ]
    return bank.add(entries)


def test_fault25_without_its_newest_version_an_id_names_the_one_before(bank, tmp_path):
    bank.add([entry("a", 1, "falcon in the locker"), entry("b", 9, "amber badge")])
    reader = Bank.open(tmp_path / "bank")
    bank.update("a", entry("a", 2, "cedar in the locker"))
    bank.update("a", entry("a", 3, "comet in the locker"))
    assert reader.search("comet locker", 1)[0].ref == "a@3"
    bank.delete("a@2")
    assert bank.resolve("a").ref == "a@3"
    bank.delete("a@3")
    for one in (bank, reader):
        assert one.resolve("a").ref == "a@1" and [e.ref for e in one.list()] == ["a@1", "b@1"]
        assert [hit.ref for hit in one.search("falcon locker", 2)] == ["a@1", "b@1"], "seen by searches again"
        assert equal(one.load("a@1"), entry("a", 1).block)
    assert bank.verify() == []
    bank.update("a", entry("a", 4))
    assert bank.resolve("a").ref == "a@4", "numbers are not given twice"
    bank.delete("a@4")
    bank.delete("a@1")
    assert not bank.knows("a") and bank.verify() == []
    reader.close()


def test_fault25_an_earlier_version_is_found_behind_a_graph(bank, monkeypatch):
    """A graph that was built while another version was the newest does not hold it."""
    monkeypatch.setattr("mem_triton.store.bank.vectors.SMALLEST_GRAPH", 8)
    bank.add([entry("a", 1, "falcon in the locker")])
    bank.update("a", entry("a", 2, "cedar at home"))
    bank.add([entry(f"x{i}", i, f"filler number {i}") for i in range(20)])
    assert list((bank.path / "index").iterdir())
    bank.delete("a@2")
    assert bank.search("falcon in the locker", 1)[0].ref == "a@1" and bank.verify() == []


def test_fault25_references_of_a_document_have_names_in_its_order(bank):
    add_document(bank, "guide", [40, 0, 90])
    add_document(bank, "guide2", [0])
    add_document(bank, "private", [5], tenant="acme")
    bank.add([entry("guide:notes", 7)])
    starts = [info.metadata["start"] for info in resolve_all(bank, "guide#*")]
    assert starts == [0, 40, 90]
    assert [info.metadata["start"] for info in resolve_all(bank, "guide#1")] == [40]
    assert [info.metadata["start"] for info in resolve_all(bank, "guide#1-2")] == [40, 90]
    assert [info.ref for info in resolve_all(bank, "guide:notes")] == ["guide:notes@1"]
    with pytest.raises(BankError, match=r'"guide#3": "guide" has 3 references, #0 to #2'):
        resolve_all(bank, "guide#3")
    with pytest.raises(UnknownEntryError):
        resolve_all(bank, "nothing#0")
    with pytest.raises(UnknownEntryError):
        resolve_all(bank, "private#0")
    assert len(resolve_all(bank, "private#0", tenant="acme")) == 1
    long = "d" * 120
    add_document(bank, long, [3, 1])
    add_document(bank, long + "e", [2])
    assert [info.metadata["start"] for info in resolve_all(bank, f"{long}#*")] == [1, 3]


def test_fault25_an_older_banks_ids_are_read_and_renamed(bank, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(writing, "check_id", str)
        older.setattr(writing.ids, "is_name", lambda _: True)
        bank.add([entry(".notes", 1), entry("private", 2, tenant="acme corp")])
        bank.update(".notes", entry(".notes", 3))
    assert [info.ref for info in bank.list()] == [".notes@2", "private@1"]
    assert documents.unnameable(bank.list()) == ([".notes"], ["acme corp"])
    assert equal(bank.load(".notes@1"), entry(".notes", 1).block)
    with pytest.raises(BankError, match="starting with a letter or digit"):
        bank.update(".notes", entry(".notes", 4))
    with pytest.raises(BankError, match='"private" is taken'):
        writing.rename(bank, ".notes", "private")
    with pytest.raises(BankError, match="must be 1 to 128"):
        writing.rename(bank, ".notes", "-x")
    assert writing.rename(bank, ".notes", "notes") == "notes@2"
    assert equal(bank.load("notes@1"), entry(".notes", 1).block) and not bank.knows(".notes")
    assert bank.search("the locker of .notes", 1)[0].ref == "notes@2"
    assert writing.rename_tenant(bank, "acme corp", "acme") == 1
    assert bank.resolve("private", tenant="acme").tenant == "acme" and documents.unnameable(bank.list()) == ([], [])
    with pytest.raises(ForeignTenantError):
        bank.resolve("private", tenant="acme corp")
    assert bank.verify() == []


def test_fault21_entries_of_a_file_are_found_however_its_path_is_written(bank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bank.add(
        [
            entry("a", 1, source="notes.md"),
            entry("b", 2, source=f"{tmp_path}/notes.md:12"),
            entry("c", 3, source="notes.mdx"),
            entry("d", 4, source="notes.md:x"),
            entry("e", 5, source="other/notes.md"),
            entry("f", 6, source="notes.md", tenant="t"),
        ]
    )
    for name in ("notes.md", f"{tmp_path}/notes.md", "./notes.md"):
        assert sorted(info.id for info in documents.of_source(bank, name)) == ["a", "b", "f"]
        assert sorted(info.id for info in documents.of_source(bank, name, tenant="")) == ["a", "b"]
    assert documents.sources(bank, "t") == ["notes.md"]
