"""What ``benchmarks.engines.waiting`` says of made-up times, and the bank that it makes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from benchmarks.engines import waiting


class Served:
    """A server whose every token takes ``step`` seconds, and ``more`` at each refresh."""

    server = SimpleNamespace(name="bank")
    random = None

    def __init__(self, step: float, more: float) -> None:
        self.step, self.more = step, more

    async def answer(self, tokens: int, fields: object) -> None:
        await asyncio.sleep(30)

    async def times(self, tokens: int, fields: object) -> list[float]:
        times, now = [], 0.0
        for i in range(tokens):
            now += self.step + (self.more if i and i % waiting.EVERY == 0 else 0.0)
            times.append(now)
        return times


@pytest.mark.parametrize("more", [0.0, 0.08])
def test_a_refresh_shows_in_the_windows_around_it_and_in_no_other(more, monkeypatch):
    monkeypatch.setattr(waiting.asyncio, "sleep", _soon(asyncio.sleep))
    args = SimpleNamespace(probes=8)
    found = asyncio.run(waiting.next_tokens(Served(0.01, more), None, args, 0))
    assert len(found["at"]) == 2 * 3 and len(found["within"]) == 2 * 27
    assert found["within"] == pytest.approx([0.01] * 54) and found["at"] == pytest.approx([0.01 + more / 8] * 6)


def _soon(sleep):
    return lambda seconds: sleep(0 if seconds <= 1 else seconds)


def test_ratios_are_of_the_same_round_and_the_median_of_rounds_is_told():
    rounds = [
        {"stock": {"none": [s, s, s]}, "bank": {"cold": [s * k] * 3}} for s, k in ((1.0, 1.5), (10.0, 1.1), (0.1, 9.0))
    ]
    told = waiting.ratios(rounds, ("bank", "cold"), ("stock", "none"))
    assert told == {"p50": 1.5, "p99": pytest.approx(1.5), "p50_of_rounds": [1.5, 1.1, 9.0]}


def test_the_bank_has_more_entries_than_the_pool_holds(tmp_path):
    from mem_triton.store.bank import Bank
    from mem_triton.store.pool.pool import PagePool

    gib = waiting.make_bank(waiting.Path("benchmarks/recall/model"), tmp_path / "bank")
    with Bank.open(tmp_path / "bank") as bank:
        spec = bank.spec
        last = f"entry-{waiting.ENTRIES - 1}@1"
        assert bank.load(last).tokens == waiting.ENTRY_TOKENS
    pages = PagePool.pages_for_bytes(
        round(gib * 2**30),
        num_layers=len(spec.layers),
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        page_tokens=16,
        dtype=waiting.torch.float32,
    )
    needed = waiting.REFERENCES * waiting.ENTRY_TOKENS // 16
    assert 2 * needed <= pages < waiting.ENTRIES * waiting.ENTRY_TOKENS // 16, "cold references push others out"
