"""No exception of ours ends an engine (fault 1): whose memory is lost, how the front end hears of it, what it does."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import pytest
import torch
from prometheus_client import REGISTRY

from mem_triton.runtime.frontend.memory import MemoryLostError, Opened
from mem_triton.runtime.incidents import VARIABLE, IncidentLog, Incidents, make_file
from mem_triton.runtime.worker.memory import BatchMemory, attend_or_lose
from mem_triton.store.pool import loader
from mem_triton.store.pool.page_load import PageLoad
from mem_triton.store.pool.tables import MemoryTables
from mem_triton.systems.base import RequestMemory, WorkerPart
from mem_triton.systems.delta_mem.slots import StateSlots
from mem_triton.systems.delta_mem.worker import DeltaWorker
from mem_triton.systems.explicit.worker import ExplicitMemory
from mem_triton.systems.payload import PageRun, RequestPayload, Segment, SystemPayload, encode
from tests.support.front import front_end


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "incidents.jsonl"))
    return tmp_path / "incidents.jsonl"


class Filled:
    """A fetcher that fills pages at once."""

    def __init__(self, pool, read, *, over, **_) -> None:
        self.loaded, self._over = [], over
        self.copies = SimpleNamespace(mark=lambda: None, join=lambda copied: None)

    def start(self, load: PageLoad) -> None:
        self.loaded.append((load.ref, list(load.pages)))
        self._over(load)

    def stats(self) -> dict[str, int]:
        return {}


def explicit() -> ExplicitMemory:
    """One without a bank, a pool or an engine."""
    memory = object.__new__(ExplicitMemory)
    memory.tables = MemoryTables(slots=4, max_pages=4, page_tokens=4, device=torch.device("cpu"))
    memory.captures = SimpleNamespace(
        enter=lambda *_: None, leave=lambda *_: None, set_rows=lambda *_: None, drop_request=lambda *_: None
    )
    with mock.patch.object(loader, "Fetcher", Filled):
        memory.loader = loader.PageLoader(None, None, readers=lambda pages: memory.tables.readers(pages))
    memory.loaded = memory.loader._fetcher.loaded
    memory._host = SimpleNamespace(exclusive=contextlib.nullcontext)
    return memory


def part_that_reads(ref: str, *pages: int) -> SystemPayload:
    return SystemPayload(segments=(Segment(ref),), pages={ref: PageRun(pages, 4 * len(pages))})


def reads(ref: str, *pages: int) -> bytes:
    return encode(RequestPayload({"memory": part_that_reads(ref, *pages)}))


def batch(path, explicit=None, slots=None) -> tuple[BatchMemory, Incidents]:
    parts = {} if explicit is None else {"memory": explicit}
    if slots is not None:
        parts["delta"] = object.__new__(DeltaWorker)
        parts["delta"].slots = slots
    return BatchMemory(parts), Incidents(path)


def test_fault01_a_worker_reports_and_the_front_end_reads_it_once(path):
    log, incidents = IncidentLog(), Incidents(path)
    assert incidents.of("a", final=True) is None and incidents.epoch == 0
    log.report(["a", "b", "a"], "attention", ValueError("x" * 5000))
    log.report(["a"], "attention", ValueError("again"))
    assert "attention: ValueError: xxx" in incidents.of("a", final=True) and len(incidents.of("b")) <= 300
    assert incidents.epoch == 1 and path.stat().st_size == 0, "the file does not grow"
    log.report(["c"], "enter", KeyError("c"))
    assert incidents.of("c") is None, "between two looks nothing is read"
    assert incidents.of("c", final=True) and incidents.epoch == 2
    assert set(incidents.lost()) == {"a", "b", "c"}


def test_fault01_a_counter_says_how_many_and_where(path):
    def counted(where: str) -> float:
        return REGISTRY.get_sample_value("mem_triton:incidents_total", {"where": where}) or 0.0

    before = {where: counted(where) for where in ("enter", "attention")}
    IncidentLog().report(["a", "b"], "enter", ValueError("x" * 5000))
    IncidentLog().report(["c"], "attention", KeyError("a client's word"))
    Incidents(path).look(final=True)
    assert [counted(where) - before[where] for where in before] == [2, 1]


def test_fault01_an_engine_without_a_file_still_goes_on(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    IncidentLog().report(["a"], "enter", ValueError("x"))


def test_fault01_files_of_killed_engines_go_with_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "")
    code = "import os\nfrom mem_triton.runtime.incidents import make_file\nprint(make_file(), flush=True)\nos._exit(9)"
    killed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    folder = os.path.dirname(killed.stdout.strip())
    assert os.path.isdir(folder) and (os.stat(folder).st_mode & 0o077) == 0
    own = make_file()
    assert not os.path.exists(folder) and own.parent.is_dir()


def test_fault01_whose_answer_is_withheld_and_what_is_not_found_again(path):
    part = SimpleNamespace(identity=lambda memory, salted: "k", payload=lambda memory: None)
    memory, opened = front_end(part, incidents=Incidents(path)), Opened({"delta": RequestMemory()})
    before = memory.identity(opened)
    memory.check("a", final=True)
    IncidentLog().report(["a"], "attention", RuntimeError("no kernel"))
    with pytest.raises(MemoryLostError, match="no kernel"):
        memory.check("a", final=True)
    memory.check("b", final=True)
    assert before == "k" and memory.identity(opened) != before


def test_fault01_nothing_that_a_part_raises_gets_past_the_batch(path):
    """Every method of a part fails, also those that put right what failed before."""

    class Broken(WorkerPart):
        calls: ClassVar = {}

        def enter(self, request_id, payload):
            raise RuntimeError("enter")

        def begin_step(self, step):
            raise RuntimeError("begin_step")

        def forget_rows(self):
            raise RuntimeError("forget_rows")

        def leave(self, request_id):
            raise RuntimeError("leave")

        drop_request = leave

    memory, incidents = BatchMemory({"memory": Broken()}), Incidents(path)
    memory.enter("a", lambda: reads("alice", 0))
    memory.begin_step(["a", "plain"], [0, 0], [3, 3])
    memory.leave("a")
    assert set(incidents.lost()) == {"a", "plain"}, "rows of the step before may be read by anybody"


def test_fault29_after_an_incident_blocks_that_lack_their_references_are_not_found_again(path):
    explicit = SimpleNamespace(payload=lambda reading: SystemPayload("k"))
    memory = front_end(explicit=explicit, incidents=Incidents(path))
    opened = Opened({"memory": RequestMemory()})
    before = memory.payload(opened)
    IncidentLog().report(["a"], "attention", RuntimeError("no kernel"))
    memory.incidents.look(final=True)
    after = memory.payload(opened)
    assert before.systems["memory"].key == "k" and after.systems["memory"].key != "k"
    assert memory.payload(opened) == after, "until the next incident requests share again"


def test_fault29_incidents_are_written_and_taken_under_one_lock(path, monkeypatch):
    """A worker that writes while the front end takes would be cut off; what it wrote before that is taken, too."""
    log, incidents, locked = IncidentLog(), Incidents(path), []

    def flock(file, operation):
        locked.append((operation, path.stat().st_size))
        if file.mode == "r+":  # another worker had the lock until now
            with open(path, "a") as other:
                other.write(json.dumps({"request": "late", "where": "enter", "reason": "late"}) + "\n")

    monkeypatch.setattr(fcntl, "flock", flock)
    log.report(["a"], "attention", ValueError("x"))
    size = path.stat().st_size
    assert set(incidents.lost()) == {"a", "late"} and path.stat().st_size == 0
    assert locked == [(fcntl.LOCK_EX, 0), (fcntl.LOCK_EX, size)], "before it writes, and before it reads"


@pytest.mark.parametrize("where", ["enter", "set_rows"])
def test_fault01_a_request_whose_tables_raise_loses_its_memory_alone(path, where, monkeypatch):
    part = explicit()
    memory, incidents = batch(path, explicit=part)
    stock = getattr(MemoryTables, "enter" if where == "enter" else "_show")

    def broken(self, subject, *args):
        if subject == "bad" or getattr(subject, "runs", {}).get("bad@1"):
            raise ZeroDivisionError("ours")
        return stock(self, subject, *args)

    monkeypatch.setattr(MemoryTables, "enter" if where == "enter" else "_show", broken)
    for name, page in (("bad", 0), ("good", 1)):
        part.load_page(f"{name}@1", [page], 4)
        memory.enter(name, lambda name=name, page=page: reads(f"{name}@1", page))
    for _ in range(3):
        memory.enter("bad", lambda: reads("bad@1", 0))  # runners say it at every step
        memory.begin_step(["bad", "good"], [0, 0], [3, 3])
        assert part.tables.row_slot[0] == -1 and part.tables.row_slot[1] >= 0
    assert set(incidents.lost()) == {"bad"}
    memory.leave("bad")
    memory.leave("good")
    assert sorted(part.tables._free) == [0, 1, 2, 3], "no slot is lost"


def test_fault01_a_payload_that_cannot_be_read_costs_its_request_alone(path):
    memory, incidents = batch(path, explicit=explicit(), slots=StateSlots([0], 4, 2, torch.device("cpu")))
    memory.enter("bad", lambda: json.loads("{"))
    memory.enter("newer", lambda: encode(RequestPayload({}, version=99)))
    memory.begin_step(["bad", "newer"], [0, 0], [0, 0])
    assert set(incidents.lost()) == {"bad", "newer"}
    assert memory.parts["delta"].slots.row_slot.tolist() == [-1, -1]
    memory.leave("newer")
    assert len(memory.parts["delta"].slots._free) == 2


def test_fault01_a_step_whose_rows_cannot_be_written_runs_without_memory(path, monkeypatch):
    part = explicit()
    memory, incidents = batch(path, explicit=part)
    part.load_page("a@1", [0], 4)
    memory.enter("a", lambda: reads("a@1", 0))
    memory.begin_step(["a"], [0], [3])
    monkeypatch.setattr(MemoryTables, "_staged", lambda self, values: 1 / 0)
    memory.begin_step(["plain", "a"], [0, 4], [3, 4])
    assert part.tables.row_slot.tolist() == [-1] * 4 and set(incidents.lost()) == {"a"}


def test_fault01_a_failed_attention_costs_the_readers_and_a_failed_state_everybody(path):
    part = explicit()
    memory, incidents = batch(path, explicit=part)
    part.load_page("a@1", [0], 4)
    memory.enter("a", lambda: reads("a@1", 0))
    memory.begin_step(["a", "plain"], [0, 0], [3, 3])
    memory.lose_step(RuntimeError("kernel"), everybody=False)
    assert set(incidents.lost()) == {"a"}
    memory.lose_step(RuntimeError("kernel"), everybody=True)
    assert set(incidents.lost()) == {"a", "plain"}


def test_fault02_pages_that_are_still_read_are_not_filled_with_something_else():
    part = explicit()
    assert part.load_page("a@1", [0, 1], 8).result(0) == {"error": None, "stats": {}}
    part.enter("running", part_that_reads("a@1", 0, 1))
    over = part.load_page("b@1", [1], 4)  # the client of "running" has left, the engine does not know yet
    assert part.loaded == [("a@1", [0, 1])] and not over.done()
    part.leave("running")
    assert part.loaded[1:] == [("b@1", [1])] and over.result(0)["error"] is None


def test_control_without_the_look_at_readers_pages_are_filled_while_they_are_read(monkeypatch):
    part = explicit()
    part.load_page("a@1", [0, 1], 8)
    part.enter("running", part_that_reads("a@1", 0, 1))
    monkeypatch.setattr(MemoryTables, "readers", lambda self, pages: [])
    assert part.load_page("b@1", [1], 4).done() and part.loaded[1:] == [("b@1", [1])]


def test_fault02_a_request_whose_pages_were_given_away_does_not_read_them(path):
    part = explicit()
    memory, incidents = batch(path, explicit=part)
    part.load_page("a@1", [0], 4)
    part.load_page("b@1", [0], 4)
    memory.enter("late", lambda: reads("a@1", 0))
    memory.begin_step(["late"], [0], [3])
    assert part.tables.row_slot[0] == -1 and "something else" in incidents.of("late", final=True)


def test_fault01_attention_goes_on_without_memory_and_what_it_raises_then_is_not_ours():
    calls, lost = [], []

    def attend(way: str) -> None:
        calls.append(way)
        if way in broken:
            raise RuntimeError("kernel")

    def run() -> None:
        attend_or_lose(lambda: attend("memory"), lambda: attend("stock"), lost.append)

    broken = ["memory"]
    run()
    assert calls == ["memory", "stock"] and [str(e) for e in lost] == ["kernel"]
    broken = []
    run()
    assert calls[2:] == ["memory"]
    broken = ["memory", "stock"]
    with pytest.raises(RuntimeError):
        run()
    assert len(lost) == 1


def test_fault29_a_request_that_comes_again_after_it_lost_its_memory_has_memory(path):
    part = explicit()
    memory, _ = batch(path, explicit=part)
    part.load_page("a@1", [0], 4)
    memory.enter("r", lambda: json.loads("{"))
    memory.leave("r")
    memory.enter("r", lambda: reads("a@1", 0))
    assert "r" in part.tables


def test_a_request_that_is_told_of_at_every_step_is_read_once(path):
    part, read = explicit(), []
    memory, _ = batch(path, explicit=part)
    part.load_page("a@1", [0], 4)
    for _ in range(3):
        memory.enter("r", lambda: read.append("r") or reads("a@1", 0))
    assert read == ["r"] and "r" in part.tables
    memory.leave("r")  # preempted
    memory.enter("r", lambda: read.append("again") or reads("a@1", 0))
    assert read == ["r", "again"] and "r" in part.tables


def test_fault29_what_is_remembered_of_incidents_is_bounded(path, monkeypatch):
    monkeypatch.setattr("mem_triton.runtime.incidents.KEPT", 2)
    log, incidents = IncidentLog(), Incidents(path)
    log.report(["a", "b", "c"], "attention", ValueError("x"))
    assert set(incidents.lost()) == {"b", "c"} and set(log._told) == {"b", "c"}


def test_fault29_a_report_that_cannot_be_written_raises_nothing(tmp_path):
    IncidentLog(tmp_path).report(["a"], "attention", ValueError("x"))  # a folder


def test_fault29_files_of_living_engines_stay_whoever_starts_or_ends_beside_them(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "")
    first = make_file()
    make_file()
    assert first.parent.is_dir(), "its process lives"
    code = (
        "import os, sys\nfrom mem_triton.runtime.incidents import make_file\nfolder = make_file().parent\n"
        "if not (child := os.fork()):\n    sys.exit()\nos.waitpid(child, 0)\nprint(folder.is_dir())"
    )
    forked = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert forked.stdout.strip() == "True", "a child that ends takes nothing of its parent's"


def test_fault01_a_client_may_name_his_next_request_as_the_one_that_was_lost(path):
    memory, log = front_end(incidents=Incidents(path)), IncidentLog()
    log.report(["same"], "attention", RuntimeError("no kernel"))
    with pytest.raises(MemoryLostError):
        memory.check("same", final=True)
    memory.check("same", final=True)
    log.report(["other"], "leave", RuntimeError("after its answer"))
    memory.begin("other")
    memory.check("other", final=True)


def test_fault01_a_folder_that_a_cleaner_took_and_a_torn_line_hide_nothing(tmp_path):
    path = tmp_path / "cleaned" / "incidents.jsonl"
    incidents, log = Incidents(path), IncidentLog(path)
    log.report(["a"], "attention", RuntimeError("x"))
    assert incidents.of("a", final=True)
    path.write_text('{"request": "torn')
    assert incidents.of("torn", final=True) is None
    log.report(["b"], "attention", RuntimeError("x"))
    assert incidents.of("b", final=True)
