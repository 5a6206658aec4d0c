"""``mem_capture`` from its fields to its entry: who may, under which name, what becomes of it, what is left behind."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine, Generator
from http import HTTPStatus
from typing import Any

import pytest
from safetensors import SafetensorError

from mem_triton.config import ConfigError, parse_config
from mem_triton.store.bank import Bank, BankError, NewEntry
from mem_triton.store.bank.captured import reader_of
from mem_triton.store.bank.writing import rename_tenant
from mem_triton.systems.explicit import captures as captures_module
from mem_triton.systems.explicit import frontend as frontend_module
from mem_triton.systems.explicit import worker_captures as worker_module
from mem_triton.systems.params import RequestParams
from mem_triton.systems.registry import parse_request
from mem_triton.systems.request import RequestError
from tests.runtime.capture_case import PROMPT, Served, make_bank
from tests.store.bank_case import block, spec


@pytest.fixture
def bank(tmp_path):
    return make_bank(tmp_path / "bank")


def refused(served: Served, message: str, asked: RequestParams | None = None, **fields) -> None:
    with pytest.raises(RequestError, match=message):
        served.captures.check(
            parse_request({"mem_capture": "note", **fields}).systems["memory"], asked or RequestParams()
        )


def written(bank, id: str, **fields) -> None:
    """What an operator writes."""
    with Bank.open(bank, writable=True) as writer:
        writer.add([NewEntry(id, f"the text of {id}", block(1, dense=True), **fields)])


def test_fault07_captures_are_off_unless_the_configuration_says_otherwise(bank):
    assert parse_config({"memory": {"bank": "b"}}).memory.capture == "off"
    refused(Served(bank, "off"), r'mem_capture: this server keeps nothing: its mem_triton\.memory\.capture is "off"')
    assert not (bank / "incoming").exists(), "a server that keeps nothing writes nothing"
    with pytest.raises(ConfigError, match=r"memory\.capture"):
        parse_config({"memory": {"bank": "b", "capture": "all"}})


@pytest.mark.parametrize(
    ("asked", "fields", "message"),
    [
        (RequestParams(answers=2), {}, "set n to 1, got 2"),
        (RequestParams(lora=True), {}, "LoRA"),
        (RequestParams(), {"mem_capture": "a" * 128}, "136 characters, an id has at most 128"),
    ],
)
def test_fault07_what_cannot_be_kept_is_refused_before_it_runs(bank, asked, fields, message):
    refused(Served(bank), message, asked, **fields)


def test_fault07_a_server_for_tenants_keeps_nothing_for_nobody(bank):
    served = Served(bank, "tenant")
    refused(served, "say mem_tenant")
    assert served.capture(mem_tenant="acme").ref == "capture.acme:note@1"


def test_fault07_a_bank_of_references_keeps_no_prompts(tmp_path):
    Bank.create(tmp_path / "bank", spec()).close()
    refused(Served(tmp_path / "bank"), 'this bank is of kind "memory3"')


def test_fault07_a_prompt_that_could_never_be_read_is_refused_before_it_runs(bank):
    served = Served(bank)
    capture = served.open().parts["memory"].capture
    with pytest.raises(RequestError, match="129 tokens could never be read: they need 9 memory pages"):
        served.captures.begin(capture, list(range(129)))
    with pytest.raises(RequestError, match="no tokens"):
        served.captures.begin(capture, [])


def test_fault07_a_capture_lies_where_no_operator_writes_and_supersedes_nothing_of_theirs(bank):
    written(bank, "pub0")
    served = Served(bank)
    assert served.capture("pub0", mem_replace=1).ref == "capture:pub0@1"
    with Bank.open(bank) as reader:
        assert reader.resolve("pub0").ref == "pub0@1"
    for id in ("capture:mine", "capture.acme:mine"):
        with pytest.raises(BankError, match="kept for captures"):
            written(bank, id)


def test_fault07_a_name_that_is_taken_is_superseded_only_when_the_request_says_so(bank):
    served = Served(bank)
    assert served.capture().ref == "capture:note@1"
    refused(served, r'"capture:note" is there; say "mem_replace": 1')
    assert served.capture(mem_replace=1).ref == "capture:note@2"
    assert served.bank.load("capture:note@1").tokens == len(PROMPT), "the earlier one stays"


def test_fault07_two_requests_cannot_capture_under_one_name_at_once(bank):
    served = Served(bank)
    opened = served.open()
    refused(served, "being captured by another request")
    served.memory.close(opened)
    assert served.capture().ref == "capture:note@1"


def test_fault29_a_request_that_is_over_frees_no_name_of_another(bank):
    served = Served(bank)
    over = served.open().parts["memory"].capture
    served.captures.release(over)
    served.open()
    served.captures.release(over)
    refused(served, "being captured by another request")


def test_fault29_an_entry_of_another_tenant_under_the_name_is_neither_seen_nor_superseded(bank):
    """Ids say whose a capture is; once a tenant has another name they say a name that somebody else may get."""
    served = Served(bank)
    served.capture(mem_tenant="acme")
    with Bank.open(bank, writable=True) as writer:
        rename_tenant(writer, "acme", "other")
    served.memory.close(served.open(mem_tenant="acme"))  # not "is there"
    capture = served.capture(mem_tenant="acme", mem_replace=1)
    assert capture.ref is None and "is there" not in capture.report()["error"]
    with Bank.open(bank) as reader:
        assert reader.resolve("capture.acme:note", tenant="other").ref == "capture.acme:note@1"


def test_fault29_what_an_operator_wrote_there_before_the_namespace_is_not_superseded(bank, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr("mem_triton.store.bank.writing.is_captured", lambda id: False)
        written(bank, "capture.acme:note", tenant="acme")
    refused(Served(bank), "was not captured; choose another name", mem_tenant="acme", mem_replace=1)


def test_fault07_captures_without_a_tenant_are_read_by_id_and_found_by_no_search(bank):
    served = Served(bank)
    served.capture(), served.capture("own", mem_tenant="acme")
    assert served.bank.search("text", 10) == [] and served.bank.search("text", 10, tenant="other") == []
    assert [hit.ref for hit in served.bank.search("text", 10, tenant="acme")] == ["capture.acme:own@1"]
    assert served.bank.resolve("capture:note@1", tenant=reader_of("capture:note@1", "other")).ref == "capture:note@1"
    for id in ("capture.acme:own", "capture.acme:none"):
        with pytest.raises(BankError, match=f'entry "{id}" is unknown, or not yours'):
            served.bank.resolve(id, tenant=reader_of(id, "other"))


def test_fault07_whether_another_tenant_has_captured_a_name_cannot_be_told(bank):
    served = Served(bank)
    served.capture("secret", mem_tenant="acme")
    reports = [served.capture(name, mem_tenant="spy").report() for name in ("secret", "nothing")]
    assert reports == [{"id": "capture.spy:secret@1"}, {"id": "capture.spy:nothing@1"}]


def test_fault07_what_else_the_request_read_is_no_part_of_what_is_kept(bank):
    """The entry is read by a request of its own, which carries a capture and nothing else."""
    served, seen = Served(bank), []
    stock = served.worker.enter
    served.worker.enter = lambda name, carried: (seen.append(carried), stock(name, carried))
    assert served.capture(answer=[1, 2]).ref and served.read == [PROMPT]
    assert served.capture("more", answer=[1, 2], mem_capture_answer=1).ref and served.read[1] == [*PROMPT, 1, 2]
    assert all(order.tokens for order in seen) and len(seen) == 2


def test_fault07_an_engine_in_another_precision_captures_into_the_bank_s(bank):
    served = Served(bank)
    stock = served.worker.read_context
    served.worker.read_context = lambda *a: tuple(part.bfloat16() for part in stock(*a))
    assert served.capture().ref and served.bank.load("capture:note@1").keys.dtype == served.bank.spec.torch_dtype


def test_fault14_numbers_that_the_bank_s_dtype_cannot_hold_are_not_kept(tmp_path):
    folder = tmp_path / "half"
    Bank.create(folder, spec(kind="prefix", keep_tokens=None, codec="fp16", dtype="float16")).close()
    served = Served(folder)
    context = served.worker.read_context
    served.worker.read_context = lambda *request: tuple(70000 * part for part in context(*request))
    error = served.capture().error
    assert error is not None and "hold NaN or infinity" in str(error)
    assert served.left() == [] and served.bank.stats()["entries"] == 0


def test_fault07_a_name_that_is_taken_meanwhile_is_an_error_and_not_a_version(bank):
    served, other = Served(bank), Served(bank)
    opened = served.open()
    assert other.capture().ref
    asyncio.run(served.end(opened))
    assert opened.parts["memory"].capture.error.status == HTTPStatus.CONFLICT and "is there" in str(
        opened.parts["memory"].capture.error
    )


FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize("broken", [OSError(errno.ENOSPC, FULL), SafetensorError(f"IoError: {FULL} (os error 28)")])
def test_fault17_a_full_disk_is_an_error_with_its_reason_and_leaves_nothing(bank, monkeypatch, broken):
    def full(tensors, file, **_):
        file.write_bytes(b"half")
        raise broken

    served = Served(bank)
    with monkeypatch.context() as patch:
        patch.setattr(worker_module, "save_file", full)
        capture = served.capture()
    assert (capture.ref, capture.error.status) == (None, HTTPStatus.INSUFFICIENT_STORAGE)
    assert 'mem_capture: "note" was not kept: ' in str(capture.error) and "No space left" in capture.report()["error"]
    assert served.left() == []
    assert served.capture().ref == "capture:note@1", "it works again"


@pytest.mark.parametrize(("broken", "status"), [(OSError(errno.ENOSPC, "x"), 507), (SafetensorError("x"), 500)])
def test_fault17_a_bank_that_cannot_be_written_is_an_error_and_leaves_nothing(bank, monkeypatch, broken, status):
    def fails(*_, **__):
        raise broken

    served = Served(bank)
    with monkeypatch.context() as patch:
        patch.setattr(Bank, "add", fails)
        capture = served.capture()
    assert capture.error.status == status and served.left() == []
    assert served.capture().ref == "capture:note@1"


def test_fault18_a_client_may_leave_at_any_await_and_nothing_stays_behind(bank):
    """Cancelled at each point where any task lets the loop go on, a capture is carried to its end all the same."""
    served, point, cancelled = Served(bank), 0, True
    while cancelled:
        point += 1

        async def leaves(point=point):
            opened, reached, cancelled = served.open(f"n{point}"), 0, False

            def let_go() -> None:
                nonlocal reached, cancelled
                reached += 1
                cancelled = cancelled or (reached == point and task.cancel())

            watch(asyncio.get_running_loop(), let_go)
            task = asyncio.create_task(served.end(opened))
            await asyncio.wait([task])
            served.memory.close(opened)  # as engines do
            while served.memory._owned:
                await asyncio.sleep(0.001)
            return cancelled, opened.parts["memory"].capture

        cancelled, capture = asyncio.run(leaves())
        assert capture.ref == f"capture:n{point}@1" and served.left() == [], point
        assert point < 1_000
    assert point > 12


def watch(loop: asyncio.AbstractEventLoop, let_go: Callable[[], None]) -> None:
    """Call ``let_go`` whenever a task that starts from now on waits for something, and when that is there."""

    class Watched:
        def __init__(self, coroutine: Coroutine) -> None:
            self.coroutine = coroutine

        def __await__(self) -> Generator:
            steps = self.coroutine.__await__()
            try:
                awaited = next(steps)
                while True:
                    loop.call_soon(let_go)
                    if awaited is not None:
                        awaited.add_done_callback(lambda _: let_go())  # before the task hears of it
                    try:
                        sent = yield awaited
                    except BaseException as error:
                        awaited = steps.throw(error)
                    else:
                        awaited = steps.send(sent)
            except StopIteration as end:
                return end.value

    async def run(coroutine: Coroutine) -> Any:
        return await Watched(coroutine)

    loop.set_task_factory(lambda loop, coroutine, **options: asyncio.Task(run(coroutine), loop=loop, **options))


def test_fault18_a_request_that_does_not_end_normally_keeps_nothing(bank):
    served = Served(bank)
    opened = served.open()
    asyncio.run(served.end(opened, normal=False))
    served.memory.close(opened)
    assert served.read == [] and served.left() == []
    assert "did not end normally" in opened.parts["memory"].capture.report()["error"]


@pytest.mark.parametrize("method", ["captured", "drop_captures"])
def test_fault18_workers_that_cannot_be_asked_leave_no_file(bank, method):
    served, stock = Served(bank), None

    async def gone(name, *args):
        if name == method:
            served.worker._writer.submit(int).result(20)  # what is being written is there by now
            raise RuntimeError("rank 0 is gone")
        return await stock(name, *args)

    stock, served.call = served.call, gone
    served.memory.call = lambda system, *call: gone(*call)
    capture = served.capture()
    assert (capture.error is None) == (method == "drop_captures")
    assert list(served.captures.folder.iterdir()) == [] and not served.captures._running


def test_fault28_a_capture_waits_for_its_files_no_longer_than_the_deadline(bank, monkeypatch):
    served = Served(bank)
    stock = served.call

    async def hangs(name, *args):
        if name == "captured":
            await asyncio.Event().wait()
        return await stock(name, *args)

    served.call = hangs
    served.memory.call = lambda system, *call: hangs(*call)
    monkeypatch.setattr(frontend_module, "CAPTURE_SECONDS", 0.05)
    capture = served.capture()
    assert "were not written in" in str(capture.error) and not served.captures._running


def test_fault18_an_engine_request_that_fails_leaves_nothing(bank):
    served = Served(bank)

    async def fails(ids, opened):
        served.worker.enter("late", served.memory.payload(opened).systems["memory"].capture)
        raise RuntimeError("aborted")

    served.run_engine = fails
    capture = served.capture()
    served.worker.set_rows(["late"], [99])
    served.worker.leave("late")  # the engine tells its workers later
    served.worker._writer.submit(int).result(20)
    assert "aborted" in str(capture.error) and served.left() == []


def test_fault18_a_server_removes_what_a_killed_one_has_left_and_nothing_of_a_living_one(bank):
    code = (
        "import os, sys, fcntl; os.makedirs(sys.argv[1], exist_ok=True);"
        "h = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(h, fcntl.LOCK_SH);"
        "open(os.path.join(sys.argv[1], 'lease.0.safetensors'), 'w').close(); print('up', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(bank / "incoming")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"up\n"
        Served(bank)
        assert [path.name for path in (bank / "incoming").iterdir()] == ["lease.0.safetensors"]
    finally:
        other.kill()
        other.wait()


def test_fault18_what_a_killed_server_has_left_is_gone_when_the_next_one_starts(bank):
    (bank / "incoming").mkdir()
    (bank / "incoming" / "lease.0.safetensors").touch()
    Served(bank, "off")
    assert list((bank / "incoming").iterdir()), "a server that keeps nothing touches nothing"
    Served(bank)
    assert not list((bank / "incoming").iterdir())


def test_fault29_every_living_server_keeps_its_files_when_the_first_one_ends(bank):
    """The lock is shared once it is had: whoever lives holds it, not only who came first."""
    first, second = captures_module._hold(bank / "incoming"), captures_module._hold(bank / "incoming")
    (bank / "incoming" / "lease.0.safetensors").touch()
    os.close(first)
    os.close(captures_module._hold(bank / "incoming"))
    assert list((bank / "incoming").iterdir()), "the second server still lives"
    os.close(second)
    os.close(captures_module._hold(bank / "incoming"))
    assert not list((bank / "incoming").iterdir())


def test_fault18_a_bank_that_cannot_be_written_is_refused_at_the_start(bank):
    (bank / "incoming").write_text("no folder")
    with pytest.raises(ConfigError, match=r'mem_triton\.memory\.capture: .*incoming cannot be written .*"off"'):
        Served(bank)
