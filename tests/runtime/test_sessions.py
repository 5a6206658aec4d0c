"""The session store: versions, exclusive writers, bounded memory, files that are whole or absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.systems.delta_mem.request import SessionRequest
from mem_triton.systems.delta_mem.sessions import SessionStore, StateLayout, layer_order
from mem_triton.systems.request import RequestError

LAYERS = tuple(f"model.layers.{i}.self_attn" for i in range(12))
LAYOUT = StateLayout(LAYERS, heads=2, rank=4, adapter="a" * 64, model="m" * 64)


def state(seed: int) -> bytes:
    return np.random.default_rng(seed).standard_normal(LAYOUT.state_bytes // 4).astype(np.float32).tobytes()


def write(store: SessionStore, name: str, seed: int, tokens: int = 5) -> int:
    lease = store.open(SessionRequest(name))
    try:
        return store.commit(lease, state(seed), tokens)
    finally:
        store.close(lease)


def read(store: SessionStore, name: str):
    lease = store.open(SessionRequest(name, write=False))
    store.close(lease)
    return lease.start


def test_a_session_grows_by_versions(tmp_path):
    store = SessionStore(LAYOUT, tmp_path)
    assert read(store, "alice").version == 0 and read(store, "alice").data is None
    assert [write(store, "alice", seed) for seed in (1, 2)] == [1, 2]
    start = read(store, "alice")
    assert (start.version, start.data, start.tokens) == (2, state(2), 10)


def test_states_survive_a_restart_bit_for_bit(tmp_path):
    write(SessionStore(LAYOUT, tmp_path), "alice", 7)
    start = read(SessionStore(LAYOUT, tmp_path), "alice")
    assert (start.version, start.data, start.tokens) == (1, state(7), 5)


def test_an_aborted_request_commits_nothing(tmp_path):
    store = SessionStore(LAYOUT, tmp_path)
    write(store, "alice", 1)
    lease = store.open(SessionRequest("alice"))
    store.close(lease)
    with pytest.raises(ValueError, match="may not write"):
        store.commit(lease, state(2), 5)
    assert read(store, "alice").data == state(1)


def test_one_writer_at_a_time_and_readers_see_the_last_commit():
    store = SessionStore(LAYOUT)
    write(store, "alice", 1)
    writer = store.open(SessionRequest("alice"))
    with pytest.raises(RequestError, match=r'"alice" is being written.*"mem_write": 0'):
        store.open(SessionRequest("alice"))
    reader = store.open(SessionRequest("alice", write=False))
    assert reader.start.data == state(1)
    store.commit(writer, state(2), 5)
    store.close(writer)
    assert reader.start.data == state(1), "a running reader keeps the version it started from"
    assert read(store, "alice").data == state(2)
    with pytest.raises(ValueError, match="may not write"):
        store.commit(reader, state(3), 5)


def test_cache_keys_tell_memories_apart():
    store = SessionStore(LAYOUT)
    keys = set()

    def key_of(request: SessionRequest) -> str:
        lease = store.open(request)
        store.close(lease)
        return lease.key

    for _ in range(2):
        keys |= {key_of(r) for r in (SessionRequest("a"), SessionRequest("a", write=False), SessionRequest("b"))}
        write(store, "a", 1)
    keys |= {key_of(SessionRequest()), key_of(SessionRequest(write=False))}
    assert len(keys) == 3 + 2 + 2, "name, version, write flag and no session at all are all different"
    other = SessionStore(replace(LAYOUT, adapter="b" * 64))
    lease = other.open(SessionRequest())
    assert lease.key not in keys, "the adapter is part of the key"
    assert key_of(SessionRequest("b")) in keys, "the same memory keeps its key, so that prefixes are shared"


def test_reset_starts_from_zeros_and_keeps_counting(tmp_path):
    store = SessionStore(LAYOUT, tmp_path)
    write(store, "alice", 1)
    lease = store.open(SessionRequest("alice", reset=True))
    assert lease.start.data is None
    assert store.commit(lease, state(2), 3) == 2
    store.close(lease)
    assert read(SessionStore(LAYOUT, tmp_path), "alice").tokens == 3


@pytest.mark.parametrize("field", ["adapter", "model"])
def test_a_file_of_another_model_or_adapter_is_refused(tmp_path, field):
    write(SessionStore(LAYOUT, tmp_path), "alice", 1)
    other = SessionStore(replace(LAYOUT, **{field: "other"}), tmp_path)
    with pytest.raises(RequestError, match=rf"another {field}.*mem_reset"):
        other.open(SessionRequest("alice"))
    lease = other.open(SessionRequest("alice", reset=True))  # the way out that the message names
    assert other.commit(lease, state(2), 3) == 2


def test_a_broken_file_is_refused_and_kept(tmp_path):
    write(SessionStore(LAYOUT, tmp_path), "alice", 1)
    path = tmp_path / "alice.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RequestError, match=r"cannot read .*alice"):
        SessionStore(LAYOUT, tmp_path).open(SessionRequest("alice"))
    assert path.exists()


def test_without_a_directory_a_new_session_beyond_the_limit_is_refused():
    store = SessionStore(LAYOUT, max_sessions=2)
    write(store, "a", 1), write(store, "b", 2)
    with pytest.raises(RequestError, match=r"no room.*set session_dir or raise max_sessions"):
        store.open(SessionRequest("c"))
    assert read(store, "a").data == state(1), "nothing was lost to make room"


def test_with_a_directory_idle_sessions_leave_memory_and_come_back(tmp_path):
    store = SessionStore(LAYOUT, tmp_path, max_sessions=2)
    for seed, name in enumerate("abcd"):
        write(store, name, seed)
    assert len(store) == 2
    assert [read(store, name).data for name in "abcd"] == [state(seed) for seed in range(4)]
    held = [store.open(SessionRequest(name)) for name in "ab"]
    with pytest.raises(RequestError, match="raise max_sessions"):
        store.open(SessionRequest("c"))  # both places are in use
    for lease in held:
        store.close(lease)


def test_sessions_that_never_committed_take_no_room():
    store = SessionStore(LAYOUT, max_sessions=1)
    for name in "abc":
        store.close(store.open(SessionRequest(name)))
    assert len(store) == 0


def test_a_directory_that_cannot_be_written_is_an_error_at_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="session_dir: cannot write"):
        SessionStore(LAYOUT, tmp_path / "file")


def test_a_failed_write_keeps_the_last_version(tmp_path, monkeypatch):
    store = SessionStore(LAYOUT, tmp_path)
    write(store, "alice", 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write(store, "alice", 2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["alice.safetensors"], "no half-written file stays"
    for other in (store, SessionStore(LAYOUT, tmp_path)):
        assert read(other, "alice").data == state(1)
    assert write(store, "alice", 3) == 2


def test_kill_at_any_time_leaves_whole_files(tmp_path):
    """A real process is killed while it commits, again and again: every file is a whole version, none goes back."""
    script = textwrap.dedent(
        f"""
        import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
        from pathlib import Path
        from test_sessions import LAYOUT, SessionStore, write
        store = SessionStore(LAYOUT, Path({str(tmp_path)!r}))
        print("ready", flush=True)
        for i in range(10**6):
            print(write(store, "alice", seed=0), flush=True)
        """
    )
    seen = 0
    for delay in (0.0, 0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        for _ in range(int(delay * 100) + 1):
            seen = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        seen = max([seen, *map(int, rest)])
        start = read(SessionStore(LAYOUT, tmp_path), "alice")
        assert start.data == state(0) and start.version >= seen, "an acknowledged commit was lost"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["write", "abort", "read"])), max_size=20))
def test_any_sequence_of_requests_counts_right(steps):
    store, versions = SessionStore(LAYOUT), dict.fromkeys("abc", 0)
    for name, what in steps:
        if what == "write":
            versions[name] += 1
            assert write(store, name, versions[name]) == versions[name]
        elif what == "abort":
            store.close(store.open(SessionRequest(name)))
        start = read(store, name)
        assert start.version == versions[name]
        assert start.data == (state(versions[name]) if versions[name] else None)


def test_layers_are_in_model_order():
    assert sorted(LAYERS, key=layer_order) == list(LAYERS) and sorted(LAYERS) != list(LAYERS)
