"""M+'s long-term memory beside the authors' code: what is dropped, merged, forgotten and picked, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mem_triton.systems.memoryllm import long_term
from mem_triton.systems.memoryllm.long_term import LongTerm, LongTermRows, PoolState, gather, pick, scores_of
from mem_triton.systems.memoryllm.pools import Pools
from mem_triton.systems.memoryllm.records import PoolError
from mem_triton.systems.memoryllm.retriever import RowRetriever
from mem_triton.systems.memoryllm.shape import LongTermShape
from tests.cli.test_cli import run
from tests.memoryllm.test_mplus_convert import MPLUS

UPDATES = {"grown": 70, "few": 9}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mplus")
    for case in UPDATES:
        run("convert", "mplus", MPLUS / case, folder / case)
    return {case: folder / case for case in UPDATES}


@pytest.fixture
def store(converted, tmp_path, request):
    import shutil

    shutil.copytree(converted[request.param] / "memory", tmp_path / "memory")
    with Pools.open(tmp_path / "memory", writable=True) as pools:
        yield request.param, pools


def keys_of(case: str, delta: torch.Tensor) -> torch.Tensor:
    """The retriever's keys [L, n, K] of new rows [L, n, d], by the checkpoint's weights."""
    weights = load_file(MPLUS / case / "model.safetensors")
    found = []
    for layer, rows in enumerate(delta):
        stem = f"model.layers.{layer}"
        normed = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-5)
        x = normed * weights[f"{stem}.input_layernorm.weight"]
        if case == "grown":
            x = torch.nn.functional.silu(x @ weights[f"{stem}.self_attn.key_proj.0.weight"].T)
            x = x @ weights[f"{stem}.self_attn.key_proj.2.weight"].T
        else:
            x = x @ weights[f"{stem}.self_attn.key_proj.weight"].T
        found.append(x)
    return torch.stack(found)


def write(pools: Pools, case: str, update: int, expected: dict[str, torch.Tensor], name: str = "main") -> str:
    delta = expected["deltas"][update]
    with pools.writing(name, seed=update) as writing:
        writing.apply(delta, 8, keys_of(case, delta))
        return writing.commit()


def check(state: PoolState, expected: dict[str, torch.Tensor]) -> None:
    """A pool and its long-term memory are those of the authors' code after its last update."""
    long = state.long_term
    for layer in range(3):
        for kind, own, names in (
            ("merged", long.merged[layer], ("ltm", "ltm_keys", "ltm_ages")),
            ("fresh", long.fresh[layer], ("cached", "cached_keys", "cached_ages")),
        ):
            rows, keys, ages = (expected[f"{name}.{layer}"] for name in names)
            assert torch.equal(torch.cat([part.content[0] for part in own]), rows), (kind, layer)
            assert (torch.cat([part.keys for part in own]) - keys).abs().max() < 1e-5
            assert torch.equal(torch.cat([part.stamps for part in own]) + long.clock, ages)
        often = torch.cat([part.frequencies for part in long.merged[layer]])
        assert torch.equal(often, expected[f"ltm_recall_frequencies.{layer}"])
        assert torch.equal(long.ages[layer], expected[f"memory_ages.{layer}"])


@pytest.mark.parametrize("store", UPDATES, indirect=True)
def test_c9_c11_many_updates_with_merges_are_those_of_the_authors_code(store):
    case, pools = store
    expected = load_file(MPLUS / case / "expected.safetensors")
    for update in range(UPDATES[case]):
        reference = write(pools, case, update, expected)
        if f"{update + 1}.memory" in expected:
            assert torch.equal(pools.rows(reference), expected[f"{update + 1}.memory"])
    check(pools.state("main"), expected)
    again = Pools.open(pools.path)
    check(again.state("main"), expected)
    reference = pools.snapshot("main")
    check(Pools.open(pools.path).state(reference), expected)
    middle = UPDATES[case] // 2
    pools.fork("twin", f"main@{middle + 1}")  # and what is forked in the middle goes on alike
    pools.compact("twin")
    for update in range(middle, UPDATES[case]):
        write(pools, case, update, expected, "twin")
    check(Pools.open(pools.path).state("twin"), expected)
    assert pools.verify() == []


@pytest.mark.parametrize("store", ["grown"], indirect=True)
def test_c11_the_generator_goes_on_with_the_long_term_memory(store):
    case, pools = store
    expected = load_file(MPLUS / case / "expected.safetensors")
    pools.fork("twin", "main")
    for name in ("main", "twin"):
        for update in range(3):
            if name == "twin" and update == 2:
                pools.compact("twin")
                pools._newest.clear()
            delta = expected["deltas"][update]
            with pools.writing(name) as writing:
                writing.apply(delta, 8, keys_of(case, delta))
                writing.commit()
    one, other = pools.state("main"), pools.state("twin")
    assert torch.equal(one.rows, other.rows)
    assert all(torch.equal(one.long_term.ages_of(layer), other.long_term.ages_of(layer)) for layer in range(3))


@pytest.mark.parametrize("store", ["grown"], indirect=True)
def test_keys_come_with_rows_and_are_checked(store):
    case, pools = store
    expected = load_file(MPLUS / case / "expected.safetensors")
    delta = expected["deltas"][0]
    for keys, message in (
        (None, "rows of M\\+ come with the retriever's"),
        (torch.zeros(3, 8, 15), "expected"),
        (torch.full((3, 8, 16), float("nan")), "NaN or infinity, so nothing is written"),
    ):
        with pools.writing("main") as writing, pytest.raises(PoolError, match=message):
            writing.apply(delta, 8, keys)
    with pytest.raises(PoolError, match="fork one of M"):
        pools.add("other", torch.zeros(3, 32, 32))
    assert pools.info("main").version == 1


def test_versions_share_what_they_have_in_common():
    shape = LongTermShape(read=2, merge=4, first=2.0, decay=1.0, keys=1)
    empty = ((),)
    long = LongTerm(0, torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, 6, 1), empty, empty)
    seen = [long]
    for i in range(40):
        dropped = torch.tensor([[0, 1]], dtype=torch.int32)
        content = ((torch.full((2, 1), float(i)),),)
        seen.append(seen[-1].dropping(dropped, content, torch.zeros(1, 2, 1), shape))
    assert seen[2].count(0) == (4, 0) and seen[4].count(0) == (4, 0) and seen[5].count(0) == (4, 2)
    assert seen[5].merged[0][0].content[0] is seen[4].merged[0][0].content[0], "no row is copied"
    assert max(sum(one.count(0)) for one in seen) <= 4 + 2, "and what has decayed is forgotten"


def test_ages_count_from_the_drop_and_stand_still_in_the_pool():
    shape = LongTermShape(read=2, merge=100, first=2.0, decay=1.0, keys=1)
    long = LongTerm(0, torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, 1), ((),), ((),))
    nothing = ((torch.zeros(2, 1),),)
    long = long.dropping(torch.tensor([[0, 1]], dtype=torch.int32), nothing, torch.zeros(1, 2, 1), shape)
    assert long.ages.tolist() == [[0, 0, 1, 0]] and long.ages_of(0).tolist() == [0, 0]
    long = long.dropping(torch.tensor([[0, 2]], dtype=torch.int32), nothing, torch.zeros(1, 2, 1), shape)
    assert long.ages.tolist() == [[0, 0, 1, 0]] and long.ages_of(0).tolist() == [2, 2, 0, 1]


def test_picks_are_the_best_and_stand_by_age_and_few_rows_are_repeated_with_the_first_copy_cut():
    ages = torch.tensor([5, 1, 9, 9, 0])
    assert pick(torch.tensor([0.1, 0.9, 0.8, 0.7, 0.2]), ages, 5, 3).tolist() == [3, 2, 1]
    assert pick(None, ages, 2, 5).tolist() == [0, 0, 1, 1, 1], "the last five of 0 1 0 1 0 1"
    rows = [
        LongTermRows((torch.arange(n)[:, None] + at,), torch.zeros(n, 1), torch.zeros(n), torch.zeros(n))
        for n, at in ((2, 0), (3, 2))
    ]
    (found,) = gather(rows, torch.tensor([4, 0, 2, 2, 1]))
    assert found.flatten().tolist() == [4, 0, 2, 2, 1]
    queries, keys = torch.randn(7, 4), torch.randn(9, 4)
    whole = (queries @ keys.T).sigmoid().mean(0)
    assert torch.allclose(scores_of(queries, keys.split(4)), whole)


def test_a_retriever_that_is_not_whole_is_refused():
    with pytest.raises(PoolError, match=r"no retriever\.0\.query\.0"):
        RowRetriever({}, 1, "silu", "cpu", torch.float32)
    with pytest.raises(PoolError, match="hidden_act is 'tanh'"):
        RowRetriever({}, 1, "tanh", "cpu", torch.float32)


@pytest.mark.parametrize("store", ["grown"], indirect=True)
def test_controls_of_the_quirks(store, monkeypatch):
    """Ages that grow in the pool, and a merge that always forgets, are not those of the authors."""
    case, pools = store
    expected = load_file(MPLUS / case / "expected.safetensors")
    stock = LongTerm.dropping

    def growing(self, dropped, *rest):
        older = long_term.replace(self, ages=self.ages + dropped.shape[1])
        return stock(older, dropped, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(LongTerm, "dropping", growing)
        for update in range(UPDATES[case]):
            write(pools, case, update, expected)
        with pytest.raises(AssertionError):
            check(pools.state("main"), expected)
