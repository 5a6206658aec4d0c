"""Requests are counted by their adapter, and what is kept of an adapter goes with the last who uses it (fault 14)."""

from __future__ import annotations

import asyncio
import gc

import pytest

from mem_triton.systems.lora_users import AdapterInUseError, AdapterUsers


def test_fault14_nothing_is_kept_of_adapters_that_nobody_uses_or_changes():
    """Whoever may name adapters could fill the server's memory with their names."""

    async def main():
        users = AdapterUsers()
        for key in range(500):
            leave = users.enter(key)
            assert not users.lock(key).locked()
            leave()
            async with users.lock(key):
                await users.gone(key, str(key))
        gc.collect()
        return [len(table) for table in (users._locks, users._counts, users._gone)]

    assert asyncio.run(main()) == [0, 0, 0]


def test_fault14_all_who_change_an_adapter_have_one_lock():
    """Also those who come while others wait for it, and behind those who left."""

    async def main():
        users, inside, most = AdapterUsers(), 0, []

        async def change():
            nonlocal inside
            async with users.lock(7):
                inside += 1
                most.append(inside)
                try:
                    await asyncio.sleep(0.001)
                    gc.collect()
                    assert users.lock(7).locked()
                finally:
                    inside -= 1

        changing = []
        for number in range(20):
            changing.append(asyncio.ensure_future(change()))
            await asyncio.sleep(0.0005)
            if number % 5 == 2:
                changing[number // 2].cancel()
        ends = await asyncio.gather(*changing, return_exceptions=True)
        return most, ends, users.lock(7).locked()

    most, ends, locked = asyncio.run(main())
    assert len(most) >= 15 and set(most) == {1} and not locked
    assert {type(end) for end in ends} == {type(None), asyncio.CancelledError}


def test_fault14_a_load_that_waits_too_long_names_the_adapter_and_leaves_nothing():
    async def main():
        users = AdapterUsers(longest_wait=0.01)
        leave = users.enter(7)
        async with users.lock(7):
            with pytest.raises(AdapterInUseError, match="'poet' answers 1 requests"):
                await users.gone(7, "poet")
        leave()
        leave()  # harmless
        await users.gone(7, "poet")
        return users._gone, users._counts

    assert asyncio.run(main()) == ({}, {})
