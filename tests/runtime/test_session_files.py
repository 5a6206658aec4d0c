"""Files of sessions: what they say is checked, what cannot be kept is said, and they have one writer of all servers."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mem_triton.systems.delta_mem import session_files
from mem_triton.systems.delta_mem.request import SessionRequest
from mem_triton.systems.delta_mem.sessions import SessionStore, SessionWriteError
from mem_triton.systems.request import RequestError
from tests.runtime.test_sessions import LAYOUT, read, state, write


@pytest.fixture
def stored(tmp_path) -> Path:
    write(SessionStore(LAYOUT, tmp_path), "alice", 1)
    return tmp_path / "alice.safetensors"


def damage(good: bytes, rng: random.Random) -> bytes:
    data, how, at = (
        bytearray(good),
        rng.choice(["bit", "bit", "cut", "bytes", "zero", "longer"]),
        rng.randrange(len(good)),
    )
    if how == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "bytes":
        for _ in range(20):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif how == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    else:
        data += b"x" * rng.randrange(1, 100)
    return bytes(data)


def test_fault19_no_mutated_file_loads_as_if_right(stored):
    """Six hundred mutations: each is refused with the way out, or changes nothing that is read."""
    good, rng, refused = stored.read_bytes(), random.Random(1), 0
    for _ in range(600):
        stored.write_bytes(damage(good, rng))
        try:
            start = read(SessionStore(LAYOUT, stored.parent), "alice")
        except RequestError as error:
            assert error.field == "mem_session" and "alice" in str(error) and "mem_reset" in str(error)
            refused += 1
        else:
            assert (start.data, start.version, start.tokens, start.lora) == (state(1), 1, 5, "")
    assert refused > 500


@pytest.mark.parametrize("what", ["junk", "empty", "directory", "dangling link", "link", "pipe", "no permission"])
def test_fault19_reset_repairs_any_damage(stored, what):
    stored.unlink()
    if what == "junk":
        stored.write_bytes(b"junk" * 100)
    elif what == "empty":
        stored.touch()
    elif what == "directory":
        stored.mkdir()
        (stored / "photo").write_text("x")
    elif what in ("dangling link", "link"):
        (stored.parent / "other").write_text("precious") if what == "link" else None
        stored.symlink_to(stored.parent / "other")
    elif what == "pipe":
        os.mkfifo(stored)
    else:
        stored.write_bytes(b"junk")
        stored.chmod(0)
    store = SessionStore(LAYOUT, stored.parent)
    with pytest.raises(RequestError, match=r"cannot read .*alice.*mem_reset"):
        store.open(SessionRequest("alice"))
    lease = store.open(SessionRequest("alice", reset=True))
    assert lease.start.data is None
    store.commit(lease, state(2), 3)
    store.close(lease)
    assert read(SessionStore(LAYOUT, stored.parent), "alice").data == state(2)
    if what == "link":
        assert (stored.parent / "other").read_text() == "precious", "what a link points at is not ours"
    if what == "directory":
        assert list(stored.parent.glob(".damaged-alice*/photo")), "what lay there is kept"


def test_fault19_a_reset_that_is_aborted_leaves_the_session_and_its_damage_as_they_were(stored):
    store = SessionStore(LAYOUT, stored.parent)
    lease = store.open(SessionRequest("alice", reset=True))
    assert read(store, "alice").data == state(1), "a reader beside a reset sees the last commit"
    store.close(lease)
    assert read(store, "alice").data == state(1)
    stored.write_bytes(b"junk")
    lease = store.open(SessionRequest("alice", reset=True))
    with pytest.raises(RequestError, match="cannot read"):
        read(store, "alice")
    store.close(lease)
    with pytest.raises(RequestError, match="cannot read"):
        read(store, "alice")
    assert stored.read_bytes() == b"junk"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("on_disk", [True, False])
def test_fault19_a_state_that_is_not_finite_is_never_committed(tmp_path, bad, on_disk):
    store = SessionStore(LAYOUT, tmp_path if on_disk else None)
    write(store, "alice", 1)
    values = np.frombuffer(state(2), np.float32).copy()
    values[7] = bad
    lease = store.open(SessionRequest("alice"))
    with pytest.raises(SessionWriteError, match=r'"alice".*not finite.*last version'):
        store.commit(lease, values.tobytes(), 5)
    store.close(lease)
    assert read(store, "alice").data == state(1)
    assert write(store, "alice", 3) == 2


def test_fault19_a_state_that_is_not_finite_is_never_read(stored, monkeypatch):
    """Its digest may be right: a version before this one could commit it."""
    values = np.frombuffer(state(2), np.float32).copy()
    values[0] = float("nan")
    store = SessionStore(LAYOUT, stored.parent)
    store.files.write("alice", replace(read(store, "alice"), data=values.tobytes()))
    with pytest.raises(RequestError, match=r"not finite.*mem_reset"):
        read(SessionStore(LAYOUT, stored.parent), "alice")


def test_fault19_files_of_before_digests_stay_readable(stored):
    header = {"format": session_files.OLD_FORMAT, "session": "alice", "version": "4", "tokens": "9"}
    header |= {"adapter": LAYOUT.adapter, "model": LAYOUT.model}
    save_file(load_file(stored), stored, metadata=header)
    store = SessionStore(replace(LAYOUT, served={"dtype": "bfloat16", "weights": "w"}), stored.parent)
    start = read(store, "alice")
    assert (start.version, start.data, start.tokens) == (4, state(1), 9)
    assert write(store, "alice", 2) == 5
    with safe_open(stored, "pt") as file:
        assert file.metadata()["format"] == session_files.FORMAT and file.metadata()["digest"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
def test_fault17_a_version_that_cannot_be_written_is_one_error_and_the_last_stays(stored, monkeypatch, error):
    store = SessionStore(LAYOUT, stored.parent)
    read(store, "alice")

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(session_files, "save_file", full)
    with pytest.raises(SessionWriteError, match=r'session "alice" could not be written.*No space.*last version'):
        write(store, "alice", 2)
    monkeypatch.undo()
    assert os.listdir(stored.parent) == ["alice.safetensors"], "neither half a file nor a lock stays"
    assert issubclass(SessionWriteError, OSError)
    for other in (store, SessionStore(LAYOUT, stored.parent)):
        assert read(other, "alice").data == state(1)
    assert write(store, "alice", 3) == 2


def test_fault29_a_commit_is_on_the_disk_before_it_is_acknowledged(tmp_path, monkeypatch):
    """The file's bytes reach the disk before it gets its name, and the name before the commit returns."""
    events, sync, move = [], os.fsync, os.replace

    def fsync(handle):
        events.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        sync(handle)

    def replaced(source, target):
        events.append(("replace", os.path.basename(target)))
        move(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replaced)
    write(SessionStore(LAYOUT, tmp_path), "alice", 1)
    assert events == [
        ("fsync", ".writing-alice.safetensors"),
        ("replace", "alice.safetensors"),
        ("fsync", tmp_path.name),
    ]


def test_fault13_two_servers_on_one_directory_lose_nothing(tmp_path):
    """What one has committed the other goes on from: no version is acknowledged twice."""
    one, other = SessionStore(LAYOUT, tmp_path), SessionStore(LAYOUT, tmp_path)
    assert [write(store, "alice", seed) for seed, store in enumerate((one, other, one, other))] == [1, 2, 3, 4]
    for store in (one, other):
        assert (read(store, "alice").version, read(store, "alice").data) == (4, state(3))
    lease = one.open(SessionRequest("alice"))
    with pytest.raises(RequestError, match=r'"alice" is being written by another request.*"mem_write": 0'):
        other.open(SessionRequest("alice"))
    with pytest.raises(RequestError, match="is being written"):
        other.open(SessionRequest("alice", reset=True))
    assert read(other, "alice").data == state(3), "readers need no lock"
    one.close(lease)
    assert write(other, "alice", 5) == 5


def test_fault13_a_file_removed_by_its_owner_is_forgotten(stored):
    store = SessionStore(LAYOUT, stored.parent)
    assert read(store, "alice").version == 1
    stored.unlink()
    assert read(store, "alice").data is None


@pytest.mark.parametrize("how", ["advanced", "removed"])
def test_fault13_a_commit_over_a_file_that_changed_meanwhile_is_refused(stored, how):
    """A writer that takes no lock: a version from before locks, or a mount without them."""
    store = SessionStore(LAYOUT, stored.parent)
    lease = store.open(SessionRequest("alice"))
    if how == "advanced":
        store.files.write("alice", session_files.CommittedState(2, state(9), 10, ""))
    else:
        stored.unlink()
    with pytest.raises(SessionWriteError, match=r'"alice".*changed or removed by another process'):
        store.commit(lease, state(2), 5)
    store.close(lease)
    start = read(store, "alice")
    assert (start.version, start.data) == ((2, state(9)) if how == "advanced" else (0, None))


def _work(directory: str, versions) -> None:
    store, done = SessionStore(LAYOUT, Path(directory)), []
    while len(done) < 10:
        try:
            done.append(write(store, "alice", seed=0, tokens=1))
        except RequestError as error:
            assert "is being written" in str(error)
    versions.put(done)


def test_fault13_servers_in_processes_of_their_own_count_every_commit_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    versions = context.Queue()
    servers = [context.Process(target=_work, args=(str(tmp_path), versions)) for _ in range(3)]
    for server in servers:
        server.start()
    acknowledged = sorted(version for _ in servers for version in versions.get(timeout=120))
    for server in servers:
        server.join()
    assert acknowledged == list(range(1, 31))
    start = read(SessionStore(LAYOUT, tmp_path), "alice")
    assert (start.version, start.tokens) == (30, 30)


def test_fault13_a_server_that_is_killed_leaves_no_lock(tmp_path):
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from tests.runtime.test_sessions import LAYOUT, SessionRequest, SessionStore
        lease = SessionStore(LAYOUT, Path({str(tmp_path)!r})).open(SessionRequest("alice"))
        print("open", flush=True)
        input()
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.readline() == "open\n"
    store = SessionStore(LAYOUT, tmp_path)
    with pytest.raises(RequestError, match="is being written"):
        store.open(SessionRequest("alice"))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert write(store, "alice", 1) == 1


def test_fault13_a_directory_whose_files_cannot_be_locked_is_an_error_at_start(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(session_files.fcntl, "flock", no_locks)
    with pytest.raises(ValueError, match=r"session_dir: .*No locks available"):
        SessionStore(LAYOUT, tmp_path)
    assert os.listdir(tmp_path) == []


SERVED = {"dtype": "float32", "rope": "{}", "quantization": "none", "weights": "w1"}


@pytest.mark.parametrize("field", ["rope", "quantization", "weights"])
def test_fault14_a_file_of_a_model_served_otherwise_is_refused_by_name(tmp_path, field):
    write(SessionStore(replace(LAYOUT, served=SERVED), tmp_path), "alice", 1)
    other = SessionStore(replace(LAYOUT, served={**SERVED, field: "other"}), tmp_path)
    with pytest.raises(RequestError, match=rf"another {field}.*this server has other.*mem_reset"):
        read(other, "alice")
    unknown = {name: value for name, value in SERVED.items() if name != field}
    assert read(SessionStore(replace(LAYOUT, served=unknown), tmp_path), "alice").data == state(1)


def test_fault14_a_state_of_another_dtype_is_read_with_a_warning(tmp_path, caplog):
    write(SessionStore(replace(LAYOUT, served=SERVED), tmp_path), "alice", 1)
    other = SessionStore(replace(LAYOUT, served={**SERVED, "dtype": "bfloat16"}), tmp_path)
    with caplog.at_level(logging.WARNING):
        assert read(other, "alice").data == state(1)
    assert "alice" in caplog.text and "dtype float32" in caplog.text and "bfloat16" in caplog.text


@pytest.mark.parametrize("told", ["", "sql:1"])
def test_fault27_a_session_belongs_to_the_lora_adapter_it_was_told_under(tmp_path, told):
    store = SessionStore(LAYOUT, tmp_path)
    lease = store.open(SessionRequest("alice"), lora=told)
    store.commit(lease, state(1), 5)
    store.close(lease)
    for other in (store, SessionStore(LAYOUT, tmp_path)):
        for write_ in (True, False):
            with pytest.raises(RequestError, match=r'mem_session: "alice" was told under .*LoRA adapter.*"poet:2"'):
                other.open(SessionRequest("alice", write=write_), lora="poet:2")
        lease = other.open(SessionRequest("alice"), lora=told)
        assert lease.start.data == state(1)
        other.close(lease)
    lease = store.open(SessionRequest("alice", reset=True), lora="poet:2")
    store.commit(lease, state(2), 5)
    store.close(lease)
    assert store.open(SessionRequest("alice"), lora="poet:2").start.data == state(2)


def test_fault27_the_lora_adapter_is_part_of_every_cache_key():
    store = SessionStore(LAYOUT)
    for request in (SessionRequest(), SessionRequest("alice", write=False)):
        assert len({store.open(request, lora).key for lora in ("", "sql:1", "sql:2")}) == 3
