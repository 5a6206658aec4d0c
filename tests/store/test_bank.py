"""The bank: versions, blocks and parts of them, tenants, readers beside a writer, and what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tarfile
import threading
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from mem_triton.ops.block_codec import get_codec
from mem_triton.store.bank import (
    Bank,
    BankError,
    BankLockedError,
    BankModelError,
    BankSpec,
    ForeignTenantError,
    NewEntry,
    UnknownEntryError,
    content_hash,
)
from mem_triton.store.block import MemoryBlock
from tests.store.bank_case import LAYERS, MODEL, block, entry, equal, spec


@pytest.fixture
def bank(tmp_path):
    with Bank.create(tmp_path / "bank", spec()) as bank:
        yield bank


def refs(bank: Bank, **options) -> list[str]:
    return [info.ref for info in bank.list(**options)]


# Entries and their versions.


def test_an_entry_comes_back_bit_for_bit(bank):
    assert bank.add([entry("a", 1, source="file.md", metadata={"page": 3, "ü": "ß"}, token_ids=[5, 6])]) == ["a@1"]
    reopened = Bank.open(bank.path)
    info = reopened.resolve("a")
    assert (info.ref, info.version, info.tokens, info.has_block) == ("a@1", 1, 8, True)
    assert (info.text, info.source, info.metadata) == ("The locker of a is number 1.", "file.md", {"page": 3, "ü": "ß"})
    assert info.content_hash == content_hash(info.text, [5, 6]) and reopened.token_ids("a@1") == [5, 6]
    assert equal(reopened.load("a@1"), block(1))
    assert reopened.spec == spec()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_b8_store_and_reload_is_bitwise(tmp_path, dtype):
    codec = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    b = block(1)
    b = replace(b, keys=b.keys.to(getattr(torch, dtype)), values=b.values.to(getattr(torch, dtype)))
    with Bank.create(tmp_path / "bank", spec(codec=codec, dtype=dtype)) as bank:
        bank.add([NewEntry("a", "text", b)])
    assert equal(Bank.open(tmp_path / "bank").load("a@1"), b)


@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_b8_a_quantised_block_is_the_codecs_own(tmp_path, codec):
    """And its parts are those of the whole: a worker that reads some heads sees what another sees of them."""
    with Bank.create(tmp_path / "bank", spec(codec=codec)) as bank:
        bank.add([entry("a", 1)])
        whole = bank.load("a@1")
        ours = get_codec(codec)
        keys, values = ours.decode(ours.encode(block(1).keys, block(1).values), torch.float32)
        assert torch.equal(whole.keys, keys) and torch.equal(whole.values, values)
        assert not torch.equal(whole.keys, block(1).keys)
        part = bank.load("a@1", layers=[4, 0], heads=slice(1, 2))
        assert torch.equal(part.keys, keys[[2, 0], 1:]) and torch.equal(part.values, values[[2, 0], 1:])


def test_a_trained_codec_needs_its_state(tmp_path):
    with pytest.raises(BankError, match="'pq' must be trained"):
        Bank.create(tmp_path / "bank", spec(codec="pq"))
    assert not (tmp_path / "bank" / "bank.json").exists()


def test_a_bank_in_product_codes(tmp_path):
    codec = get_codec("pq")
    codec.train([block(seed, tokens=48) for seed in range(40)], "PQ4x4")
    with Bank.create(tmp_path / "bank", spec(codec="pq"), codec_state=codec.state()) as bank:
        bank.add([entry("a", 1)])
        with Bank.create(tmp_path / "other", spec(codec="pq"), codec_state=codec.state()) as other:
            bank.export(tmp_path / "export")
            assert other.import_from(tmp_path / "export") == ["a@1"]
            assert equal(other.load("a@1"), bank.load("a@1"))
    bank = Bank.open(tmp_path / "bank")
    keys, _ = codec.decode(codec.encode(block(1).keys, block(1).values), torch.float32)
    assert torch.equal(bank.load("a@1").keys, keys)
    assert torch.equal(bank.load("a@1", layers=[1], heads=slice(1, 2)).keys, keys[1:2, 1:])


def test_an_update_keeps_what_was(bank):
    bank.add([entry("a", 1)])
    assert bank.update("a", entry("a", 2)) == "a@2"
    assert bank.resolve("a").ref == "a@2" and bank.resolve("a@1").text == "The locker of a is number 1."
    assert equal(bank.load("a@1"), block(1)) and equal(bank.load("a@2"), block(2))
    assert refs(bank) == ["a@2"]
    bank.compact()
    assert refs(bank) == ["a@2"] and equal(bank.load("a@2"), block(2))
    with pytest.raises(UnknownEntryError, match='"a@1" is unknown'):
        bank.load("a@1")


def test_a_number_is_never_given_twice(bank):
    """References are keys of other caches: they must mean one thing for ever."""
    bank.add([entry("a", 1)])
    bank.delete("a")
    bank.compact()
    assert bank.add([entry("a", 2)]) == ["a@2"]
    bank.delete("a@2")
    with pytest.raises(UnknownEntryError):
        bank.update("a", entry("a", 3))
    assert bank.add([entry("a", 3)]) == ["a@3"]
    assert not bank.knows("a@1") and not bank.knows("a@2")


def test_delete_hides_every_version(bank):
    bank.add([entry("a", 1), entry("b", 1)])
    bank.update("a", entry("a", 2))
    bank.delete("a")
    assert not any(bank.knows(ref) for ref in ("a", "a@1", "a@2")) and refs(bank) == ["b@1"]
    assert [hit.ref for hit in bank.search("the locker of a", 5)] == ["b@1"]
    with pytest.raises(UnknownEntryError) as error:
        bank.delete("a")
    assert error.value.entry == "a"


def test_deleting_one_version_leaves_the_others(bank):
    bank.add([entry("a", 1)])
    bank.update("a", entry("a", 2))
    bank.delete("a@2")
    assert bank.resolve("a").ref == "a@1" and not bank.knows("a@2")


def test_a_cold_entry_is_filled_once(bank):
    bank.add([NewEntry("a", "text of a", token_ids=[1, 2, 3]), entry("b", 2)])
    assert not bank.resolve("a").has_block and bank.resolve("a").tokens == 0
    with pytest.raises(BankError, match='"a@1" has text but no keys and values yet'):
        bank.load("a@1")
    assert refs(bank, only_cold=True) == ["a@1"]
    assert [h.ref for h in bank.search("text of a", 5, only_filled=True)] == ["b@1"]
    bank.fill("a@1", block(1))
    assert bank.resolve("a").tokens == 8 and equal(bank.load("a@1"), block(1)) and refs(bank, only_cold=True) == []
    with pytest.raises(BankError, match='"a@1" has its block already'):
        bank.fill("a@1", block(2))
    with pytest.raises(UnknownEntryError):
        bank.fill("c@1", block(2))


def test_one_add_is_all_or_nothing(bank):
    revision = bank.revision
    with pytest.raises(BankError, match='entry "b": text: is empty'):
        bank.add([entry("a", 1), NewEntry("b", "  ")])
    with pytest.raises(BankError, match='id "a" is 2 times in one batch'):
        bank.add([entry("a", 1), entry("a", 2)])
    assert refs(bank) == [] and bank.revision == revision and bank.stats()["orphans"] == 0


def test_the_same_content_is_found_again(bank):
    bank.add([entry("a", 1, token_ids=[1, 2], content_key="layers=0-3"), entry("t", 1, text="ours", tenant="x")])
    info = bank.resolve("a")
    assert bank.find_hash(content_hash(info.text, [1, 2], "layers=0-3")) == "a@1"
    assert bank.find_hash(content_hash(info.text, [1, 2], "layers=0-4")) is None
    assert bank.find_hash(content_hash(info.text, [12], "layers=0-3")) is None
    assert bank.find_hash("no hash") is None
    bank.update("a", entry("a", 2))
    assert bank.find_hash(info.content_hash) is None, "a superseded version is no reason not to write it again"


# Parts of blocks.


def test_only_the_needed_part_is_read(bank):
    bank.add([entry("a", 1)])
    b = block(1)
    for layers, at in (([0, 1, 4], [0, 1, 2]), ([4, 0], [2, 0]), ([1], [1]), ([1, 4], [1, 2])):
        part = bank.load("a@1", layers=layers, heads=slice(1, 2))
        assert torch.equal(part.keys, b.keys[at][:, 1:2]) and torch.equal(part.values, b.values[at][:, 1:2])
        assert torch.equal(part.positions, b.positions[at][:, 1:2])
    assert bank.load("a@1", layers=[0], dtype=torch.bfloat16).keys.dtype == torch.bfloat16
    assert bank.load("a@1", layers=[]).keys.shape == (0, 2, 8, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0, 2]}, "layer 2 is not in .* has layers 0 to 1, 4"),
        ({"heads": slice(0, 3)}, "has KV heads 0 to 1"),
        ({"heads": slice(1, 1)}, "has KV heads 0 to 1"),
        ({"heads": slice(0, 2, 2)}, "plain slice"),
    ],
)
def test_a_part_that_is_not_there_is_refused(bank, options, message):
    bank.add([entry("a", 1)])
    with pytest.raises(BankError, match=message):
        bank.load("a@1", **options)


def test_dense_positions_are_not_stored(tmp_path):
    with Bank.create(tmp_path / "bank", spec(kind="prefix", keep_tokens=None)) as bank:
        bank.add([NewEntry(f"p{t}", f"text {t}", block(t, tokens=t, dense=True)) for t in (1, 5, 200)])
        for t in (1, 5, 200):
            assert equal(bank.load(f"p{t}@1"), block(t, tokens=t, dense=True))
        (shard,) = (bank.path / "shards").iterdir()
        with safe_open(shard, framework="pt") as file:
            assert {name.split(".")[1] for name in file.keys()} == {"keys", "values"}  # noqa: SIM118


def test_the_sink_is_stored_in_all_layers(bank, tmp_path):
    sink = block(9, tokens=4, layers=MODEL.num_layers, dense=True)
    before = bank.identity
    assert bank.sink() is None
    bank.set_sink(sink)
    bank.add([entry("a", 1)])
    reader = Bank.open(bank.path)
    assert equal(reader.sink(), sink) and reader.identity == bank.identity != before
    bank.set_sink(sink)  # the same again
    with pytest.raises(BankError, match="written under another prefix"):
        bank.set_sink(block(8, tokens=4, layers=MODEL.num_layers, dense=True))
    with pytest.raises(BankError, match=r"the sink: keys are \[3, 2, 8, 16\], expected \[6, 2, 8, 16\]"):
        bank.set_sink(block(8))
    bank.compact()
    assert equal(bank.sink(), sink) and bank.verify() == []


# Tenants.


@pytest.fixture
def tenants(bank):
    bank.add(
        [
            entry("all", 1, text="everybody's number of the locker"),
            entry("x1", 2, text="the locker of x is red", tenant="x", source="s"),
            entry("y1", 3, text="the locker of y is blue", tenant="y", source="s"),
        ]
    )
    return bank


def test_a_tenant_never_sees_anothers_entry(tenants, tmp_path):
    bank = tenants
    assert refs(bank) == ["all@1", "x1@1", "y1@1"]
    for tenant, seen in (("", ["all@1"]), ("x", ["all@1", "x1@1"]), ("y", ["all@1", "y1@1"]), ("z", ["all@1"])):
        assert refs(bank, tenant=tenant) == seen
        assert sorted(h.ref for h in bank.search("the locker of x is red", 9, tenant=tenant)) == seen
        assert bank.export(tmp_path / f"of-{tenant}", tenant=tenant) == seen
        assert [bank.knows(id, tenant) for id in ("all", "x1", "y1")] == [f"{i}@1" in seen for i in ("all", "x1", "y1")]
    secret = bank.resolve("x1", any_tenant=True).content_hash
    assert bank.find_hash(secret, "x") == "x1@1" and bank.find_hash(secret, "y") is bank.find_hash(secret) is None
    assert bank.search("the locker of x is red", 9, tenant="y", source="s")[0].ref == "y1@1"


def test_a_foreign_id_reads_like_an_unknown_one(tenants):
    with pytest.raises(ForeignTenantError) as foreign:
        tenants.resolve("x1@1", tenant="y")
    with pytest.raises(UnknownEntryError) as unknown:
        tenants.resolve("nothing@1", tenant="y")
    assert not isinstance(unknown.value, ForeignTenantError)
    assert foreign.value.entry == "x1@1"
    assert str(foreign.value).replace("x1", "nothing") == str(unknown.value)


def test_a_tenant_changes_only_its_own(tenants, tmp_path):
    with pytest.raises(ForeignTenantError):
        tenants.update("x1", entry("x1", 5, tenant="y"))
    with pytest.raises(ForeignTenantError):
        tenants.update("all", entry("all", 5, tenant="y"))
    with pytest.raises(ForeignTenantError):
        tenants.delete("x1", tenant="y")
    with pytest.raises(ForeignTenantError):
        tenants.export(tmp_path / "e", ids=["x1"], tenant="y")
    with pytest.raises(BankError, match='id "x1" is taken; choose another'):
        tenants.add([entry("x1", 5, tenant="y")])
    assert refs(tenants) == ["all@1", "x1@1", "y1@1"] and not (tmp_path / "e").exists()


def test_pages_walk_through_everything_once(bank):
    entries = [NewEntry(f"{'xyz'[i % 3]}/{i:03d}", f"text {i}", tenant=["", "t", "u"][i % 3]) for i in range(50)]
    bank.add(entries)
    for tenant in (None, "", "t"):
        expected = sorted(e.id for e in entries if tenant is None or e.tenant in ("", tenant))
        found, page = [], bank.list(tenant, limit=7)
        while page:
            found += [info.id for info in page]
            page = bank.list(tenant, after=page[-1].id, limit=7)
        assert found == expected
    with pytest.raises(BankError, match="limit: 0"):
        bank.list(limit=0)


# Several processes.


def write_one(path: str) -> None:
    with Bank.open(path, writable=True) as bank:
        bank.add([entry("from-another-process", 7)])


def test_readers_see_each_commit_at_once(tmp_path):
    Bank.create(tmp_path / "bank", spec()).close()
    reader = Bank.open(tmp_path / "bank")
    assert (reader.revision, reader.search("locker", 3)) == (0, [])
    process = multiprocessing.get_context("fork").Process(target=write_one, args=(str(tmp_path / "bank"),))
    process.start()
    process.join(60)
    assert reader.revision == 1
    assert reader.search("the locker", 3)[0].ref == "from-another-process@1"
    assert equal(reader.load("from-another-process@1"), block(7))


def test_a_second_writer_is_told_who_the_first_is(bank):
    with pytest.raises(BankLockedError, match=f"is being written by process {__import__('os').getpid()} on "):
        Bank.open(bank.path, writable=True)
    with pytest.raises(BankLockedError, match="is being written"):
        Bank.open(bank.path, writable=True, wait=0.1)
    Bank.open(bank.path).close()
    timer = threading.Timer(0.2, bank.close)
    timer.start()
    with Bank.open(bank.path, writable=True, wait=20) as second:
        second.add([entry("a", 1)])
    with pytest.raises(BankError, match="open for reading; open it with writable=True"):
        Bank.open(bank.path).add([entry("b", 1)])


def test_a_reader_goes_on_over_a_compaction(bank):
    bank.add([entry(f"e{i}", i) for i in range(4)])
    reader, late = Bank.open(bank.path), Bank.open(bank.path)
    assert equal(reader.load("e1@1"), block(1))
    find = late.catalogue.find
    bank.update("e1", entry("e1", 10))

    def found_before(*arguments):
        """The catalogue is read, and then the shard is moved."""
        row = find(*arguments)
        late.catalogue.find = find
        bank.compact()
        return row

    late.catalogue.find = found_before
    assert equal(late.load("e3@1"), block(3))
    assert equal(reader.load("e2@1"), block(2)) and equal(reader.load("e1"), block(10))
    gone = [name for name in reader.shards._open if not (bank.path / "shards" / name).exists()]
    assert len(gone) == 1, "nothing was moved"
    assert equal(reader.shards.read(gone[0], 2, torch.float32), block(2)), "a shard that is gone stays mapped"


def test_threads_share_a_bank(bank):
    bank.add([entry(f"e{i}", i) for i in range(20)])
    reader, wrong = Bank.open(bank.path), []

    def work(first: int) -> None:
        for i in range(40):
            n = (first + 7 * i) % 20
            if not equal(reader.load(f"e{n}@1"), block(n)):
                wrong.append(n)
            if reader.search(f"the locker of e{n} is number {n}", 1)[0].ref != f"e{n}@1":
                wrong.append(-n)

    threads = [threading.Thread(target=work, args=(3 * i,)) for i in range(4)]
    [t.start() for t in threads]
    bank.add([entry(f"more{i}", i) for i in range(5)])
    [t.join() for t in threads]
    assert wrong == []


def test_a_forked_child_reads_for_itself(bank):
    bank.add([entry("a", 1)])
    assert bank.knows("a")

    def child() -> None:
        right = equal(bank.load("a@1"), block(1)) and bank.catalogue._pid == os.getpid() and not bank.writable
        bank.close()
        os._exit(0 if right else 3)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    with pytest.raises(BankLockedError):
        Bank.open(bank.path, writable=True)
    bank.add([entry("b", 1)])


# Keeping it in order.


def test_verify_names_what_is_damaged(bank):
    bank.add([entry("a", 1), entry("b", 2)])
    bank.add([entry("c", 3)])
    bank.add([entry("d", 3)])
    assert bank.verify() == []
    by_entry = dict(bank.catalogue.read("SELECT e.id, s.name FROM entries e JOIN shards s USING (shard)"))
    path = bank.path / "shards" / by_entry["a"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)  # one bit
    (bank.path / "shards" / by_entry["c"]).unlink()
    path = bank.path / "shards" / by_entry["d"]
    path.write_bytes(path.read_bytes()[:-1])
    with bank.catalogue.write() as db:
        db.execute("DELETE FROM vectors WHERE seq = 2")
    first, second, third, fourth = bank.verify()
    assert f"{by_entry['a']} has changed since it was written (2 entries: a@1, b@1)" in first
    assert f"{by_entry['c']} is missing (1 entries: c@1)" in second
    assert f"{by_entry['d']} has " in third and "bytes, expected" in third
    assert '"b@1" has no vector' in fourth
    with pytest.raises(BankError, match=r'"c@1": .* is missing'):
        Bank.open(bank.path).load("c@1")
    with pytest.raises(BankError, match="restore the file"):
        Bank.open(bank.path).load("d@1")


def test_compact_drops_what_nobody_can_reach(bank):
    for i in range(5):
        bank.add([entry(f"e{i}", i), entry(f"x{i}", 10 + i)])
        bank.delete(f"x{i}")
    bank.add([NewEntry("cold", "text")])
    (bank.path / "shards" / ".writing-left").write_bytes(b"half")
    (bank.path / "shards" / "0123.safetensors").write_bytes(b"orphan")
    (bank.path / ".importing-left" / "shards").mkdir(parents=True)
    before = bank.stats()
    assert (before["entries"], before["deleted"], before["shards"], before["orphans"]) == (6, 5, 5, 3)
    assert bank.compact() == {"versions": 5, "shards": 5, "files": 8}
    after = bank.stats()
    assert (after["entries"], after["deleted"], after["shards"], after["orphans"]) == (6, 0, 1, 0)
    assert after["shard_bytes"] < before["shard_bytes"]
    assert all(equal(bank.load(f"e{i}@1"), block(i)) for i in range(5)) and bank.verify() == []
    assert bank.compact() == {"versions": 0, "shards": 0, "files": 0}


@pytest.mark.parametrize("name", ["export", "export.tar"])
def test_an_export_is_imported_with_its_versions(tmp_path, bank, name):
    sink = block(9, tokens=4, layers=MODEL.num_layers, dense=True)
    bank.set_sink(sink)
    bank.add([entry("a", 1, metadata={"k": [1]}, token_ids=[3]), entry("b", 2, tenant="t"), NewEntry("c", "cold text")])
    bank.update("a", entry("a", 3))
    assert sorted(bank.export(tmp_path / name)) == ["a@1", "a@2", "b@1", "c@1"]
    with Bank.create(tmp_path / "other", spec(embedder="lexical:64")) as other:
        assert sorted(other.import_from(tmp_path / name)) == ["a@1", "a@2", "b@1", "c@1"]
        assert other.import_from(tmp_path / name) == []
        assert other.verify() == [] and equal(other.sink(), sink)
        for ref, seed in (("a@1", 1), ("a@2", 3), ("b@1", 2)):
            assert equal(other.load(ref), block(seed))
            assert other.resolve(ref, any_tenant=True) == bank.resolve(ref, any_tenant=True)
        assert other.resolve("a").ref == "a@2" and other.token_ids("a@1") == [3]
        assert other.search("cold text", 1)[0].ref == "c@1"
        assert other.update("a", entry("a", 5)) == "a@3"
        bank.fill("c@1", block(4))
        assert bank.export(tmp_path / f"again-{name}", ids=["c"]) == ["c@1"]
        other.import_from(tmp_path / f"again-{name}")
        assert equal(other.load("c@1"), block(4)), "a cold entry is filled by an import that has its block"
    with pytest.raises(BankError, match="is there already"):
        bank.export(tmp_path / name)


def test_an_export_of_one_version(tmp_path, bank):
    bank.add([entry("a", 1), entry("b", 1)])
    bank.update("a", entry("a", 2))
    assert bank.export(tmp_path / "e", ids=["a@1"]) == ["a@1"]
    exported = Bank.open(tmp_path / "e")
    assert refs(exported) == ["a@1"] and exported.resolve("a").ref == "a@1" and exported.verify() == []
    with pytest.raises(UnknownEntryError):
        bank.export(tmp_path / "f", ids=["nobody"])


def test_an_import_that_contradicts_is_refused_whole(tmp_path, bank):
    bank.add([entry("a", 1), entry("new", 5)])
    bank.export(tmp_path / "e")
    with Bank.create(tmp_path / "other", spec()) as other:
        other.add([entry("a", 2)])
        with pytest.raises(BankError, match='"a@1" is another text here'):
            other.import_from(tmp_path / "e")
        assert refs(other) == ["a@1"]
        other.delete("a")
        with pytest.raises(BankError, match='"a@1" was deleted or superseded here'):
            other.import_from(tmp_path / "e")
    with Bank.create(tmp_path / "tenants", spec()) as other:
        other.add([entry("a", 1, tenant="t")])
        with pytest.raises(BankError, match="belongs to another tenant"):
            other.import_from(tmp_path / "e")
    with Bank.create(tmp_path / "layers", spec(layers=(0, 1, 5))) as other, pytest.raises(BankError, match="layers: "):
        other.import_from(tmp_path / "e")
    another = MODEL.model_copy(update={"weights": "ffff"})
    different = "weights: bank has ffff, the import has 0123456789abcdef"
    other = Bank.create(tmp_path / "model", spec(fingerprint=another))
    with pytest.raises(BankModelError, match=different):
        other.import_from(tmp_path / "e")


def test_a_tar_with_other_things_in_it_is_refused(tmp_path, bank):
    (tmp_path / "evil").write_text("x")
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        tar.add(tmp_path / "evil", "../../evil")
    with pytest.raises(BankError, match=r"\.\./\.\./evil is no part of a bank"):
        bank.import_from(tmp_path / "evil.tar")
    with pytest.raises(BankError, match="import a bank or a tar"):
        bank.import_from(tmp_path / "evil")
    assert not list(bank.path.glob(".importing-*"))


# What is refused.


@pytest.mark.parametrize("id", ["", "a@1", "a b", "ä", "x" * 129, "a\n", None, 7])
def test_an_id_of_another_form_is_refused(bank, id):
    with pytest.raises(BankError, match="must be 1 to 128 letters"):
        bank.add([NewEntry(id, "text")])
    assert not bank.knows(id)


def test_ids_of_every_allowed_sign(bank):
    id = "Az09._-:/" + "x" * 119
    assert bank.add([NewEntry(id, "text")]) == [f"{id}@1"] and bank.resolve(f"{id}@1").id == id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(2, 2, 8, 16)}, r'entry "a": keys are \[2, 2, 8, 16\], expected \[3, 2, 8, 16\]'),
        ({"values": torch.zeros(3, 2, 7, 16)}, r"values are \[3, 2, 7, 16\]"),
        ({"keys": torch.zeros(3, 16)}, r"keys are \[3, 16\], expected \[3, 2, 'T', 16\]"),
        ({"keys": torch.zeros(3, 2, 8, 16).half()}, "keys are torch.float16, the bank has torch.float32"),
        ({"values": torch.full((3, 2, 8, 16), float("nan"))}, "values hold NaN or infinity"),
        ({"positions": torch.zeros(3, 2, 8).int()}, "positions must ascend"),
        ({"positions": torch.arange(8).expand(3, 2, 8)}, r"positions are \[3, 2, 8\] torch.int64, expected"),
        ({"positions": torch.arange(-1, 7).int().expand(3, 2, 8)}, "positions must ascend from 0"),
        ({"positions": torch.arange(121, 129).int().expand(3, 2, 8)}, "reach 128, a reference has 128 tokens"),
    ],
)
def test_a_block_that_does_not_fit_is_refused(bank, change, message):
    with pytest.raises(BankError, match=message) as error:
        bank.add([NewEntry("a", "text", replace(block(1), **change))])
    assert error.value.entry == "a" and bank.stats()["orphans"] == 0


def test_more_tokens_than_the_bank_keeps_are_refused(bank, tmp_path):
    with pytest.raises(BankError, match="have 9 tokens, the bank keeps 8"):
        bank.add([NewEntry("a", "text", block(1, tokens=9))])
    empty = MemoryBlock(torch.zeros(3, 2, 0, 16), torch.zeros(3, 2, 0, 16), torch.zeros(3, 2, 0).int())
    with pytest.raises(BankError, match="have no tokens"):
        bank.add([NewEntry("a", "text", empty)])
    bank.add([NewEntry("short", "three", block(1, tokens=3))])  # B3: references of fewer tokens are fine
    assert bank.resolve("short").tokens == 3
    prefix = Bank.create(tmp_path / "prefix", spec(kind="prefix", keep_tokens=None))
    with pytest.raises(BankError, match="positions of a dense block must be 0 to 7"):
        prefix.add([entry("a", 1)])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("text", "", "text: is empty"),
        ("text", "\ud800", "no valid Unicode"),
        ("text", b"bytes", "text: is bytes"),
        ("metadata", {"a": object()}, "JSON can hold"),
        ("metadata", {"a": float("nan")}, "JSON can hold"),
        ("token_ids", [1.5], "whole numbers"),
        ("token_ids", [2**40], "whole numbers"),
        ("tenant", None, "tenant: is NoneType"),
        ("tenant", "x" * 200, "at most 128"),
    ],
)
def test_a_wrong_field_is_named(bank, field, value, message):
    with pytest.raises(BankError, match=message):
        bank.add([replace(entry("a", 1), **{field: value})])
    assert refs(bank) == []


def test_an_update_of_another_id_is_refused(bank):
    bank.add([entry("a", 1)])
    with pytest.raises(BankError, match='the entry\'s id is "b"; give the same'):
        bank.update("a", entry("b", 1))
    with pytest.raises(UnknownEntryError):
        bank.update("b", entry("b", 1))
    with pytest.raises(BankError, match='id "a" is taken; update it'):
        bank.add([entry("a", 2)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version 2 is newer than the 1 that this mem_triton reads; upgrade"),
        ({"schema_version": None}, "schema_version is None; this is no bank"),
        ({"keep_token": 8}, 'unknown key keep_token; remove it or upgrade mem_triton. Did you mean "keep_tokens"'),
        ({"layers": [1, 0]}, "layers: .* ascending"),
        ({"layers": [0, 6]}, "6 is not one of the model's 6 layers"),
        ({"kind": "x"}, "kind: "),
        ({"codec": "zip"}, "codec: "),
        ({"kv_heads": 4}, "kv_heads: the bank has 4, its model 2"),
    ],
)
def test_a_wrong_bank_json_is_refused(bank, change, message):
    bank.close()
    data = json.loads((bank.path / "bank.json").read_text()) | change
    (bank.path / "bank.json").write_text(json.dumps(data))
    with pytest.raises(BankError, match=message):
        Bank.open(bank.path)


def test_what_is_no_bank_is_refused(tmp_path, bank):
    with pytest.raises(BankError, match="is no memory bank"):
        Bank.open(tmp_path / "nothing")
    with pytest.raises(BankError, match="is a bank already"):
        Bank.create(bank.path, spec())
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "bank.json").write_text('{"schema_ver')
    with pytest.raises(BankError, match="is no memory bank"):
        Bank.open(tmp_path / "torn")
    (tmp_path / "torn" / "bank.json").write_text("[]")
    with pytest.raises(BankError, match="holds no object"):
        Bank.open(tmp_path / "torn")


def test_a_bank_of_another_model_is_refused_with_the_field(bank):
    bank.check_model(MODEL)
    other = MODEL.model_copy(update={"weights": "beef", "rope": {"rope_theta": 1e6}})
    with pytest.raises(BankModelError) as error:
        bank.check_model(other)
    assert error.value.differences == [
        "rope: bank has {'rope_theta': 10000.0}, model has {'rope_theta': 1000000.0}",
        "weights: bank has 0123456789abcdef, model has beef",
    ]
    assert "rope: bank has" in str(error.value) and "write the bank again" in str(error.value)


def test_two_banks_have_two_identities(bank, tmp_path):
    """Their references may be the same, their entries not: what is cached for one must not serve the other."""
    other = Bank.create(tmp_path / "other", spec())
    assert other.identity != bank.identity == Bank.open(bank.path).identity
    shutil.copytree(bank.path, tmp_path / "copy")
    assert Bank.open(tmp_path / "copy").identity == bank.identity


def test_the_spec_is_what_was_asked_for():
    s = spec()
    assert BankSpec.from_dict(json.loads(s.model_dump_json())) == s
    assert s.layers == LAYERS and s.torch_dtype == torch.float32
    with pytest.raises(ValueError, match="kv_heads"):
        spec(kv_heads=3)
