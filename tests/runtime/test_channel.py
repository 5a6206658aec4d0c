"""Calls between the front end and its workers, over real sockets and, where a process has to die, real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import Future
from multiprocessing import connection

import pytest

from mem_triton.runtime import channel


@pytest.fixture
def folder(monkeypatch):
    monkeypatch.setenv(channel.VARIABLE, "")  # gone after the test
    return channel.make_folder()


def call(client, *message):
    async def main():
        try:
            return await client.call(*message)
        finally:
            client.close()

    return asyncio.run(main())


def test_a_call_reaches_every_rank_and_answers_come_in_their_order(folder):
    for rank in (1, 0):  # served in another order than asked
        channel.serve(rank, {"add": lambda a, b, rank=rank: {"rank": rank, "sum": a + b, "bytes": bytes([rank, 255])}})
    answers = call(channel.Client(2), "add", 3, 4)
    assert answers == [{"rank": r, "sum": 7, "bytes": bytes([r, 255])} for r in (0, 1)]


def test_only_this_user_may_enter_the_folder(folder):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.environ[channel.VARIABLE] == str(folder)


def test_a_long_temporary_directory_leaves_room_for_a_sockets_address(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setenv(channel.VARIABLE, "")  # gone after the test
    folder = channel.make_folder()
    with contextlib.closing(channel.serve(0, {})):
        assert not folder.is_relative_to(long)
    with pytest.raises(OSError, match="too long"):  # control: there it would not have fitted
        channel.Server(long / "mem_triton-channel-12345678" / "0", {})


def test_an_error_says_method_rank_and_reason_and_the_rank_goes_on(folder):
    def take(lease):
        if lease == "lost":
            raise KeyError("no state is held for lease lost")
        return lease

    channel.serve(0, {"take_state": lambda lease: lease})
    channel.serve(1, {"take_state": take})

    async def main():
        client = channel.Client(2)
        try:
            with pytest.raises(channel.ChannelError, match=r"take_state: rank 1: KeyError: .*lease lost"):
                await client.call("take_state", "lost")
            with pytest.raises(channel.ChannelError, match=r"tak_state: rank 0: .*known are take_state"):
                await client.call("tak_state", "x")
            return await client.call("take_state", "held")
        finally:
            client.close()

    assert asyncio.run(main()) == ["held", "held"]


def test_what_msgpack_cannot_carry_is_an_error_of_that_call(folder):
    channel.serve(0, {"odd": lambda: object()})
    with pytest.raises(channel.ChannelError, match="odd: rank 0: "):
        call(channel.Client(1), "odd")


def test_calls_of_many_tasks_get_their_own_answers(folder):
    channel.serve(0, {"echo": lambda n: n})
    channel.serve(1, {"echo": lambda n: -n})

    async def main():
        client = channel.Client(2)
        try:
            return await asyncio.gather(*(client.call("echo", n) for n in range(200)))
        finally:
            client.close()

    assert asyncio.run(main()) == [[n, -n] for n in range(200)]


def test_an_answer_to_a_call_that_was_given_up_is_not_taken_for_the_next_one(folder):
    """A task that is cancelled in the middle of a call, as when a client hangs up."""
    later = Future()
    channel.serve(0, {"slow": lambda: later, "fast": lambda: "fast"})

    async def main():
        client = channel.Client(1)
        try:
            task = asyncio.create_task(client.call("slow"))
            await asyncio.sleep(0.1)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            later.set_result("slow")
            return [await client.call("fast") for _ in range(3)]
        finally:
            client.close()

    assert asyncio.run(main()) == [["fast"]] * 3


def test_an_answer_that_takes_long_delays_no_other_and_comes_by_itself(folder):
    loads = {name: Future() for name in "abc"}
    channel.serve(0, {"load": loads.get, "ping": lambda: "pong"})

    async def main():
        client = channel.Client(1)
        try:
            waiting = {name: asyncio.create_task(client.call("load", name)) for name in loads}
            assert await client.call("ping") == ["pong"], "all three orders have arrived, and none is answered"
            loads["b"].set_result({"error": None})
            assert await waiting["b"] == [{"error": None}] and not waiting["a"].done()
            loads["a"].set_exception(OSError("disk on fire"))
            with pytest.raises(channel.ChannelError, match="load: rank 0: OSError: disk on fire"):
                await waiting["a"]
            loads["c"].cancel()
            with pytest.raises(channel.ChannelError, match="given up"):
                await waiting["c"]
        finally:
            client.close()

    asyncio.run(main())


def test_a_call_is_over_when_the_last_rank_has_answered_also_where_one_failed(folder):
    """Pages may not be given away while any rank still writes to them."""
    slow = Future()
    channel.serve(0, {"load": lambda: 1 / 0})
    channel.serve(1, {"load": lambda: slow})

    async def main():
        client = channel.Client(2)
        try:
            task = asyncio.create_task(client.call("load"))
            await asyncio.sleep(0.1)
            assert not task.done()
            slow.set_result(None)
            with pytest.raises(channel.ChannelError, match="rank 0: ZeroDivisionError"):
                await task
        finally:
            client.close()

    asyncio.run(main())


def test_a_rank_that_dies_fails_the_calls_that_wait_for_it_at_once(folder):
    """A real process serves rank 1 and is killed while it owes an answer."""
    program = (
        "import sys; from concurrent.futures import Future; from mem_triton.runtime import channel; "
        "channel.serve(1, {'ping': int, 'load': Future}); print(flush=True); sys.stdin.read()"
    )
    channel.serve(0, {"ping": int, "load": int})
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()

        async def main():
            client = channel.Client(2)
            try:
                assert await client.call("ping") == [0, 0]
                task = asyncio.create_task(client.call("load"))
                await asyncio.sleep(0.1)
                assert not task.done()
                process.kill()
                with pytest.raises(channel.ChannelError, match="load: rank 1 is gone: its process has ended"):
                    await asyncio.wait_for(task, 20)
                process.wait()
                with pytest.raises(channel.ChannelError, match=r"ping: rank 1 (does not listen|is gone)"):
                    await asyncio.wait_for(client.call("ping"), 20)
                assert not client._waiting
            finally:
                client.close()

        asyncio.run(main())
    finally:
        process.kill()
        process.wait()


def test_a_front_end_that_leaves_stops_nobody_and_another_one_is_answered(folder):
    later = Future()
    server = channel.serve(0, {"load": lambda: later, "ping": lambda: "pong"})

    async def main():
        first, second = channel.Client(1), channel.Client(1)
        task = asyncio.create_task(first.call("load"))
        assert await first.call("ping") == ["pong"]
        first.close()
        with pytest.raises(channel.ChannelError, match="gone"):
            await asyncio.wait_for(task, 20)
        later.set_result(None)  # to nobody
        assert await second.call("ping") == ["pong"]
        server.close()
        with pytest.raises(channel.ChannelError):
            await asyncio.wait_for(second.call("ping"), 20)

    asyncio.run(main())


def test_what_no_front_end_sends_costs_that_connection_alone(folder):
    channel.serve(0, {"ping": lambda: "pong"})
    stranger = connection.Client(str(folder / "0"), "AF_UNIX")
    stranger.send_bytes(b"\xc1 no msgpack")
    with pytest.raises(EOFError):
        stranger.recv_bytes()
    assert call(channel.Client(1), "ping") == ["pong"]


def test_a_rank_that_never_served_is_named(folder):
    channel.serve(0, {})
    with pytest.raises(channel.ChannelError, match="rank 1 does not listen"):
        channel.Client(2).connect()


def test_a_process_outside_of_an_engine_hears_why_it_cannot_call(monkeypatch):
    monkeypatch.delenv(channel.VARIABLE, raising=False)
    with pytest.raises(channel.ChannelError, match=channel.VARIABLE):
        channel.Client(1)


def test_the_folder_goes_with_the_process_that_made_it():
    program = "from mem_triton.runtime import channel; channel.make_folder(); channel.serve(0, {}); print(channel.current_folder())"  # noqa: E501
    folder = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert folder and not os.path.exists(folder)


def test_folders_of_dead_engines_go_and_those_of_others_stay(folder):
    code = (
        "import os, signal, time; from mem_triton.runtime import channel; print(channel.make_folder(), flush=True); "
        "channel.serve(0, {}); print('serving', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    other = process.stdout.readline().strip()
    assert process.stdout.readline().strip() == "serving"
    fresh = [channel.make_folder(), channel.make_folder()]
    assert os.path.isdir(other) and fresh[0].is_dir(), "one that serves, and one that has not begun to"
    process.kill()
    process.wait()
    fresh.append(channel.make_folder())
    assert not os.path.exists(other) and all(f.is_dir() for f in fresh)
