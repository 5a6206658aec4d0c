"""The store of pools: versions, forks, tenants, draws as the authors' code draws, and files that are damaged."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mem_triton.store.errors import BankError, BankFullError, BankLockedError
from mem_triton.systems.memoryllm import records
from mem_triton.systems.memoryllm.pools import Pools, PoolShape
from mem_triton.systems.memoryllm.records import PoolError

GOLDEN = Path(__file__).parents[1] / "data" / "memoryllm"
SHAPE = PoolShape(layers=3, rows=32, hidden=4, tokens=8, dtype="float32")


def chance(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pools(tmp_path):
    with Pools.create(tmp_path / "memory", SHAPE, {}) as pools:
        pools.add("main", chance(3, 32, 4))
        yield pools


def write(pools: Pools, name: str = "main", seed: int | None = None, value: int = 1, tenant: str = "") -> str:
    with pools.writing(name, seed, tenant) as writing:
        writing.apply(chance(3, 8, 4, seed=value), tokens=20)
        return writing.commit()


@pytest.mark.parametrize("case", ["plain", "adapters"])
def test_c4_c5_c11_updates_are_bit_equal_to_the_authors_code(case, tmp_path):
    """With its own deltas and seeds: one draw for all layers, or one a layer; survivors in order, and first rows."""
    expected, config = (
        load_file(GOLDEN / case / "expected.safetensors"),
        json.loads((GOLDEN / case / "config.json").read_text()),
    )
    shape = PoolShape(3, 32, 32, 8, "float32", per_layer=config["drop_memory_per_layer"])
    begun = load_file(GOLDEN / case / "model.safetensors")
    with Pools.create(tmp_path / "memory", shape, {}) as pools:
        pools.add("main", begun["memory"] if begun["initialized"] else None)
        for seed, text in enumerate(("long", "short", "exact", "again")):
            with pools.writing("main", seed) as writing:
                writing.apply(expected[f"{text}.delta"])
                ref = writing.commit()
            assert torch.equal(pools.rows(ref), expected[f"{text}.memory"]), text
            assert torch.equal(pools.rows(ref)[:, -8:], expected[f"{text}.delta"][:, -8:])
    with Pools.open(tmp_path / "memory") as again:
        assert torch.equal(again.rows("main"), expected["again.memory"]), "replayed from the disk"
        assert again.verify() == []
        if case == "adapters":
            for text, version in (("long", 2), ("short", 3)):
                assert torch.equal(again.rows(f"main@{version}"), expected[f"{text}.memory"]), "earlier versions stay"


def test_c12_retention_follows_the_draws(tmp_path):
    """After t updates, (1 - k/N)^t of a text's rows are left, within 4 sigma."""
    shape = PoolShape(1, 512, 1, 16, "float32")
    left, start, updates = [], torch.arange(512.0).view(1, 512, 1), 40
    with Pools.create(tmp_path / "memory", shape, {}) as pools:
        for run in range(12):
            pools.add(f"p{run}", start)
            with pools.writing(f"p{run}") as writing:
                for _ in range(updates):
                    writing.apply(torch.full((1, 16, 1), -1.0))
                rows = writing.rows.flatten()
            left.append(int((rows >= 0).sum()))
            assert torch.equal(rows[rows >= 0], rows[rows >= 0].sort()[0]), "survivors keep their order"
    p = (1 - 16 / 512) ** updates
    assert abs(sum(left) - 12 * 512 * p) < 4 * (12 * 512 * p * (1 - p)) ** 0.5


def test_c11_a_pool_goes_on_drawing_where_it_stopped(pools, tmp_path):
    """Its generator lies in its versions; a seed of a request leaves it alone."""
    pools.fork("twin", "main")
    for name in ("main", "twin"):
        write(pools, name)
    assert torch.equal(pools.rows("main"), pools.rows("twin")), "a fork goes on as the other does"
    pools.fork("straight", "main@2")
    write(pools, "straight", value=3), write(pools, "straight", value=4)
    write(pools, value=3)
    pools.close()
    with Pools.open(tmp_path / "memory", writable=True) as again:
        write(again, value=4)
        assert torch.equal(again.rows("main"), again.rows("straight")), "over a restart"
        again.fork("seeded", "main"), again.fork("other", "main")
        assert write(again, "seeded", seed=5) == "seeded@5" and write(again, "other", seed=5) == "other@5"
        assert torch.equal(again.rows("seeded"), again.rows("other"))


def test_forks_share_their_files_and_change_apart(pools, tmp_path):
    before = pools.rows("main")
    assert pools.fork("mine", "main@1") == "mine@1"
    one, other = (tmp_path / "memory" / "pools" / name / records.file_name(1, "snapshot") for name in ("main", "mine"))
    assert one.samefile(other)
    assert write(pools, "mine") == "mine@2"
    assert torch.equal(pools.rows("main"), before) and not torch.equal(pools.rows("mine"), before)
    pools.delete("main")
    assert torch.equal(pools.rows("mine@1"), before), "what it shares is still there"


def test_compacting_keeps_the_newest_version_alone(pools):
    for i in range(5):
        write(pools, value=i)
    newest = pools.rows("main")
    assert pools.snapshot("main") == "main@6" and pools.info("main").snapshots == (1, 6)
    assert torch.equal(pools.rows("main@3"), pools.rows("main@3"))
    assert pools.compact("main") > 0 and pools.info("main").snapshots == (6,)
    assert torch.equal(pools.rows("main"), newest) and pools.verify() == []
    with pytest.raises(PoolError, match='"main@3" is gone or not there yet; "main" has versions 6 to 6'):
        pools.rows("main@3")
    assert write(pools) == "main@7"


def test_c6_pools_belong_to_tenants(pools):
    pools.add("mine", chance(3, 32, 4, seed=9), tenant="acme")
    unknown = 'pool "mine" is unknown, or not yours'
    for tenant in ("", "other", "acme:mine", "../acme"):
        for act in (pools.rows, pools.info, lambda name, tenant: pools.fork("x", name, tenant)):
            with pytest.raises(PoolError, match=unknown):
                act("mine", tenant=tenant)
    assert pools.rows("mine", "acme").shape == (3, 32, 4) and pools.rows("main", "acme").shape == (3, 32, 4)
    assert [info.name for info in pools.list("other")] == ["main"]
    with pytest.raises(PoolError, match='pool "main" is unknown, or not yours'):
        write(pools, "main", tenant="acme")
    assert pools.add("main", chance(3, 32, 4, seed=8), tenant="acme") == "main@1", "a name of its own"
    assert not torch.equal(pools.rows("main", "acme"), pools.rows("main"))


def test_a_pool_that_is_made_again_is_another_one(pools):
    first = pools.info("main").identity
    pools.delete("main")
    with pytest.raises(PoolError, match="unknown"):
        pools.rows("main")
    pools.add("main", chance(3, 32, 4))
    assert pools.info("main").identity != first


@pytest.mark.parametrize("name", ["", "a b", "../x", "a:b", "a/b", ".hidden", "x" * 200, "a@1", "."])
def test_hostile_names(pools, tmp_path, name):
    before = sorted(tmp_path.rglob("*"))
    for act in (
        pools.rows,
        pools.info,
        pools.add,
        pools.delete,
        pools.compact,
        lambda n: pools.fork(n, "main"),
        lambda n: write(pools, n),
    ):
        with pytest.raises(PoolError):
            act(name)
    assert sorted(tmp_path.rglob("*")) == before


def test_rows_that_cannot_be_leave_the_pool_as_it_is(pools):
    before = pools.rows("main")
    for delta, message in (
        (chance(3, 8, 4).index_fill(0, torch.tensor([1]), float("nan")), "NaN"),
        (chance(3, 33, 4), "33 rows"),
        (chance(2, 8, 4), "expected"),
        (chance(3, 0, 4), "0 rows"),
    ):
        with pools.writing("main") as writing, pytest.raises(PoolError, match=message):
            writing.apply(delta)
    with pools.writing("main") as writing, pytest.raises(PoolError, match="nothing was written"):
        writing.commit()
    with pools.writing("main") as writing:
        writing.apply(chance(3, 8, 4))  # and whoever wrote it is gone
    assert torch.equal(pools.rows("main"), before) and pools.info("main").version == 1


def test_a_full_disk_refuses_the_write_and_later_ones_work(pools, monkeypatch):
    before = pools.rows("main")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(records, "save_file", full)
        with pytest.raises(BankFullError, match=r"nothing was changed. Make room on that disk"):
            write(pools)  # no word of entries or banks: there are none
    assert torch.equal(pools.rows("main"), before) and write(pools) == "main@2"


def test_damage_is_found_before_it_is_used(pools, tmp_path):
    for i in range(3):
        write(pools, value=i)
    folder = tmp_path / "memory" / "pools" / "main"
    good = {path: path.read_bytes() for path in folder.iterdir()}
    pools.close()
    for file, data in good.items():
        for bad in (data[: len(data) // 2], data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], b""):
            file.write_bytes(bad)
            with Pools.open(tmp_path / "memory") as opened, pytest.raises(PoolError, match="restore"):
                opened.rows("main"), opened.list()
            file.write_bytes(data)
    (folder / records.file_name(3, "delta")).unlink()
    with Pools.open(tmp_path / "memory") as opened:
        assert any("0000000003.delta" in problem for problem in opened.verify())
        assert opened.rows("main@2").shape == (3, 32, 4), "what is sound is read"
    (folder / records.file_name(3, "delta")).write_bytes(good[folder / records.file_name(3, "delta")])
    other = tmp_path / "memory" / "pools" / "main" / records.file_name(2, "delta")
    with Pools.open(tmp_path / "memory", writable=True) as opened:
        opened.fork("twin", "main@1")
        write(opened, "twin", value=9)
        swapped = tmp_path / "memory" / "pools" / "twin" / records.file_name(2, "delta")
        other.write_bytes(swapped.read_bytes())
        with pytest.raises(PoolError, match="does not follow the version before it"):
            Pools.open(tmp_path / "memory").rows("main")


def test_fault19_a_changed_byte_is_an_error_or_changes_no_row(pools, tmp_path):
    """Of numbers, of their names and of what files say beside them: a version of two updates, a snapshot, and more."""
    with pools.writing("main", 5) as writing:
        for value in (1, 2):
            writing.apply(chance(3, 8, 4, seed=value), tokens=20)
        writing.commit()
    pools.snapshot("main")
    write(pools, value=3)
    good = {reference: pools.rows(reference) for reference in ("main@1", "main@2", "main@3")}
    pools.close()
    draw, found = random.Random(0), Counter()
    for file in sorted((tmp_path / "memory" / "pools" / "main").iterdir()):
        data = file.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little") if file.suffix == ".safetensors" else len(data)
        for at in [draw.randrange(header) for _ in range(150)] + [draw.randrange(len(data)) for _ in range(50)]:
            file.write_bytes(data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :])
            for reference, rows in good.items():
                try:
                    with Pools.open(tmp_path / "memory") as opened:
                        read = opened.rows(reference)
                except PoolError:
                    found["error"] += 1
                else:
                    assert torch.equal(read, rows), (file.name, at, reference)
                    found["equal"] += 1
        file.write_bytes(data)
    assert found["error"] and found["equal"], found


def test_one_process_writes_and_others_read(pools, tmp_path):
    with pytest.raises(BankLockedError):
        Pools.open(tmp_path / "memory", writable=True)
    reader = Pools.open(tmp_path / "memory")
    assert reader.resolve("main") == ("main", 1)
    write(pools)
    assert reader.resolve("main") == ("main", 2), "at once"
    with pytest.raises(PoolError, match="open for reading"):
        write(reader)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "other"}', "[" * 100_000, '{"format": "mem_triton.pools.v1"}']
)
def test_what_is_no_store_is_one_error(tmp_path, text):
    (tmp_path / "memory.json").write_text(text)
    with pytest.raises(BankError, match=r"memory\.json"):
        Pools.open(tmp_path)


def test_there_are_not_more_pools_than_a_server_looks_after(pools):
    for i in range(63):
        pools.add(f"p{i}")
    with pytest.raises(PoolError, match="64 pools already"):
        pools.add("one-more")
    with pytest.raises(PoolError, match="has no rows yet"):
        pools.rows("p1")
