"""The kernels' benchmark: it times nothing that is wrong, counts what must move, and keeps what it shows."""

from __future__ import annotations

import csv
import functools
import json
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from benchmarks.kernels import delta_rule, delta_rule_baselines, memory_attention, registry, shapes
from benchmarks.kernels.app import app
from benchmarks.kernels.registry import DTYPES, NAMES, Case, Gate, Operation, Setup, Variant
from benchmarks.kernels.roofline import DEVICES, Work, floor_seconds
from benchmarks.kernels.runner import Deadline, Effort, choose_cases, run_case, storage_bytes

H200 = "NVIDIA H200"
SOME = {  # a few cases of each operation, small enough for a test
    "delta_rule": "decode x32,scan 16",
    "attention_inputs": "decode x8,prompt",
    "memory_attention": "decode x4,prefill",
    "memory_selection": "64",
    "reposition": "load 5,move",
    "block_codec": "5 references of 8",
}


def command(folder: Path, op: str, *more: str) -> tuple[int, str, dict[str, Any] | None]:
    """Exit code, output, and the JSON file of a run on the tiny model."""
    arguments = ["--ops", op, "--models", "tiny", "--device", "cpu", "--cases", SOME.get(op, ""), "--rounds", "3"]
    result = CliRunner().invoke(app, [*arguments, "--seconds", "0", "--save", "--folder", str(folder), *more])
    files = list(folder.glob("*.json"))
    return result.exit_code, result.output, json.loads(files[0].read_text()) if files else None


@pytest.mark.parametrize("op", SOME)
def test_an_operation_runs(op, tmp_path):
    code, output, report = command(tmp_path, op)
    assert code == 0, output
    rows = report["rows"]
    assert report["correct"] and not report["is_gpu"] and "say nothing about the GPU kernels" in report["note"]
    assert {"commit", "machine", "versions", "command"} <= set(report)
    for row in rows:
        assert row["status"] == "ok" and row["us"] > 0 and row["us_p10"] <= row["us"] <= row["us_p90"], row
        assert row["error"] <= row["tolerance"] and row["floor_us"] is None
    for case in {row["case"] for row in rows}:
        ours, others = ([r for r in rows if r["case"] == case and r["baseline"] is b] for b in (False, True))
        assert ours and others, case
        assert all(row[f"times faster than {other['variant']}"] > 0 for row in ours for other in others)
    (path,) = tmp_path.glob("*.csv")
    with path.open() as file:
        kept = list(csv.DictReader(file))
    as_text = [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
    assert [
        {k: v for k, v in row.items() if v or k in text} for row, text in zip(kept, as_text, strict=True)
    ] == as_text


def test_every_operation_is_registered():
    """A folder of mem_triton/ops without a benchmark would be found here."""
    folders = {path.parent.name for path in (Path(registry.__file__).parents[2] / "mem_triton/ops").glob("*/README.md")}
    assert folders == set(NAMES) == set(SOME)
    with pytest.raises(ValueError, match="'atention' is unknown, expected some of delta_rule"):
        registry.load("atention")


def off(function: Callable, which: str | tuple[int, ...], factor: float = 1.05) -> Callable:
    """The function, a result of which is a little too large. which: path to an argument, or "result"."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        if which == "result":
            return found * factor if isinstance(found, Tensor) else (found[0] * factor, *found[1:])
        target = functools.reduce(operator.getitem, which, args)
        target.view(len(target), -1)[-1] *= factor
        return found

    return wrong


@pytest.mark.parametrize(
    "op,name,which,variant",
    [
        ("delta_rule", "delta_rule_paged", (1,), "delta_rule_paged"),
        ("delta_rule", "delta_rule_paged", (2, 1), "delta_rule_paged"),
        ("attention_inputs", "attention_inputs", (0,), "attention_inputs"),
        ("attention_inputs", "norm_and_rope", "result", "norm and RoPE alone"),
        ("memory_attention", "memory_attention", (0, 2), "fused"),
        ("memory_selection", "selection_weights", "result", "selection_weights"),
        ("reposition", "reposition_pages", (0,), "reposition_pages"),
        ("block_codec", "dequantise_pages", "result", "int8 pages"),
        ("delta_rule_baselines", "token_loop", "result", "torch token loop"),
    ],
)
def test_what_is_wrong_gets_no_time(op, name, which, variant, tmp_path, monkeypatch):
    """The negative control of every gate, a baseline's too: a little off, and there is no time, no ratio, exit 1."""
    module = sys.modules[f"benchmarks.kernels.{op}"]
    if variant == "torch token loop":  # its gate calls it as well, in fp64
        exact = delta_rule_baselines.token_loop
        wrong = lambda i, s, *a: off(exact, "result")(i, s, *a) if s.dtype != torch.float64 else exact(i, s, *a)  # noqa: E731
    else:
        wrong = off(getattr(module, name), which)
    monkeypatch.setattr(module, name, wrong)
    code, output, report = command(tmp_path, op.removesuffix("_baselines"))
    assert code == 1 and "WRONG" in output and not report["correct"]
    red = [row for row in report["rows"] if row["status"] == "WRONG"]
    assert red and {row["variant"] for row in red} >= {variant}
    for row in red:
        assert row["error"] > row["tolerance"] and not {"us", "us_p10", "us_p90", "share_of_floor"} & set(row)
        assert not any(key.startswith("times faster") for key in row)
    others = [row for row in report["rows"] if row["status"] == "ok"]
    assert others and all(row["us"] > 0 and not row.get(f"times faster than {variant}") for row in others)


def toy(call: Callable[[Tensor], Any], **changes: Any) -> Operation:
    """An operation that should write ones into its layer, and a baseline that does."""

    def variants(case: Case, layer: Tensor, setup: Setup) -> list[Variant]:
        gate = Gate(lambda _: float((layer - 1).abs().max()), 0.0)
        ours = {"name": "ours", "writes": (layer,), **changes}
        return [
            Variant(call=lambda: call(layer), gate=gate, work=Work(8, 0), **ours),
            Variant("other", lambda: layer.fill_(1), gate, Work(8, 0), baseline=True),
        ]

    case = Case("toy", ("tiny",), "case", "fp32", {"n": 2}, 2)
    return Operation("toy", lambda models, dtype, gpu: [case], lambda case, device, seed: torch.ones(2), variants)


def run_toy(operation: Operation, said: list[str] | None = None) -> dict[str, dict]:
    setup = Setup("cpu", announce=[].append if said is None else said.append)
    rows = run_case(operation, operation.cases([], "fp32", False)[0], setup, Effort(3, 0), H200)
    return {row["variant"]: row for row in rows}


def test_a_call_that_writes_nothing_is_wrong():
    """What an earlier call left behind would be right; that is why outputs are poisoned."""
    assert run_toy(toy(lambda out: out.fill_(1)))["ours"]["us"] > 0
    row = run_toy(toy(lambda out: None))["ours"]
    assert row["status"] == "WRONG" and "us" not in row and row["error"] != row["error"]


def test_what_a_call_updates_is_put_back_before_the_next_gate():
    """Two variants that count on from 1: the second is right only if it begins where the first did."""

    def rows(updates: bool) -> list[str]:
        state = torch.ones(1)
        gate = Gate(lambda _: float((state - 2).abs()), 0.0)

        def variants(case: Case, layer: Tensor, setup: Setup) -> list[Variant]:
            more = {"updates": (state,)} if updates else {}
            return [Variant(name, lambda: state.add_(1), gate, Work(8, 0), **more) for name in ("first", "second")]

        some = toy(lambda out: None)
        return [row["status"] for row in run_toy(Operation("toy", some.cases, some.build, variants)).values()]

    assert rows(updates=True) == ["ok", "ok"]
    assert rows(updates=False) == ["ok", "WRONG"]


def test_who_raises_is_left_out_if_a_baseline_and_fails_if_ours():
    def boom(out: Tensor) -> None:
        raise RuntimeError("no such kernel\nand a long tale")

    said: list[str] = []
    rows = run_toy(toy(boom, baseline=True), said)
    assert set(rows) == {"other"} and said == ["ours is left out of case: RuntimeError: no such kernel"]
    rows = run_toy(toy(boom), said)
    assert rows["ours"]["status"] == "failed" and "us" not in rows["ours"] and rows["other"]["us"] > 0
    assert said[1:] == ["ours failed: RuntimeError: no such kernel"]


def test_what_cannot_be_had_is_said_once():
    said: list[str] = []
    setup = Setup("cpu", announce=said.append)

    def absent() -> None:
        raise ImportError("no module named flashinfer")

    assert setup.load("cascade", absent) is None and setup.load("cascade", lambda: 1) is None  # a run does not change
    assert setup.load("flash", lambda: 1) == 1
    for case in ("x1", "x2"):
        setup.left_out("cat", "too large", case)
    assert said == ["cascade is left out: ImportError: no module named flashinfer", "cat is left out of x1: too large"]
    assert set(setup.missing) == {"cascade", "cat of x1", "cat of x2"}


def test_the_limit_leaves_cases_out_and_says_which(tmp_path):
    now = [0.0]
    deadline = Deadline(1, clock=lambda: now[0])
    now[0] = 30
    assert not deadline.passed()
    deadline.took(31)
    assert deadline.passed()  # another one like that would not end in time
    assert not Deadline(None).passed()
    code, output, _ = command(tmp_path, "reposition", "--limit-minutes", "0")
    assert code == 1 and "Left out, 2:" in output and "reposition, tiny, move 800 tokens, fp32" in output


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--ops", "scan"], "--ops: 'scan' is unknown"),
        (["--models", "gpt-2"], "--models: 'gpt-2' is unknown"),
        (["--dtypes", "int4"], "--dtypes: 'int4' is unknown"),
        (["--device", "tpu"], "--device: 'tpu', expected cuda or cpu"),
    ],
)
def test_odd_arguments_are_named(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and message in result.output


def all_cases(dtype: str, gpu: bool = True) -> list[tuple[Operation, Case]]:
    models = list(shapes.MODELS.values())
    return [(op, case) for op in map(registry.load, NAMES) for case in choose_cases(op, models, [dtype], [], gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_case_of_every_model_can_be_built(dtype):
    """By shape alone: no GPU is needed to find out that a case fits together."""
    found = all_cases(dtype)
    names = [(case.op, case.models, case.name) for _, case in found]
    assert len(names) == len(set(names))
    for name in NAMES:
        assert {m for op, models, _ in names if op == name for m in models} == set(shapes.MODELS)
    for operation, case in found:
        assert storage_bytes(operation.build(case, "meta", 0)) > 0, case


def test_the_figures_have_their_points():
    series = {
        name: [case for _, case in all_cases("bf16") if case.series == name]
        for name in ("decode_batch", "pool_batch", "scan_length")
    }
    powers = [1 << n for n in range(9)]
    for op, name in (
        ("delta_rule", "decode_batch"),
        ("memory_attention", "decode_batch"),
        ("memory_attention", "pool_batch"),
    ):
        assert sorted({case.sizes["batch"] for case in series[name] if case.op == op}) == powers
    assert all(case.sizes["shared"] == 12800 for case in series["pool_batch"])
    assert sorted(case.sizes["queries"] for case in series["scan_length"]) == [1 << n for n in range(7, 16)]


def pick(op: str, name: str, model: str = "qwen3-8b", dtype: str = "bf16") -> Case:
    (case,) = [c for c in registry.load(op).cases(shapes.find([model]), dtype, True) if c.name == name]
    return case


def floor_us(work: Work) -> float:
    return floor_seconds(work, H200) * 1e6


def test_floors_are_those_computed_by_hand():
    """Numbers of the design papers (H200: 4.3 TB/s, 790 TFLOP/s) where they have the case, else counted here."""
    assert DEVICES[H200] == (4.3e12, 790e12) and floor_seconds(Work(1, 1), "another GPU") is None
    # 8,192 tokens: 32 bf16 projections in, 8 fp32 reads out, a state of 256 bytes out for every 16
    scan = delta_rule.work(pick("delta_rule", "scan 8192"))
    assert scan == Work(8192 * (64 + 32) + 512 * 256, 8192 * 640)  # 5.2 MFLOP, as in the papers
    assert floor_us(scan) == pytest.approx(0.2134, rel=1e-3)
    # one token: its projections and reads, a state in and out
    assert delta_rule.work(pick("delta_rule", "decode x32")) == Work(32 * (64 + 32 + 512), 32 * 640)

    memory3 = memory_attention.work(pick("memory_attention", "decode x1", "memory3-2b"))
    assert memory3.bytes == (4097 + 40) * 8 * 80 * 2 * 2 + 2 * 40 * 80 * 2 and memory3.flops == 4 * 4137 * 40 * 80
    assert floor_us(memory3) == pytest.approx(2.47, rel=2e-3)
    assert floor_us(memory_attention.work(pick("memory_attention", "decode x256"))) == pytest.approx(1010, rel=2e-3)
    pool = pick("memory_attention", "pool 12800 decode x16", "llama3-8b")
    pool.sizes["context"] = -1  # the papers count the pool alone
    once, each = memory_attention.work(pool), memory_attention.work(pool, shared_reads=16)
    assert floor_us(once) == pytest.approx(12.3, rel=5e-3) and floor_us(each) == pytest.approx(195, rel=5e-3)
    many = pick("memory_attention", "pool 12800 decode x256")
    many.sizes["context"] = -1
    assert floor_us(memory_attention.work(many)) == pytest.approx(68.0, rel=2e-3)  # products, not bytes

    # 512 references: q and k of 128 tokens, 40 heads of 128 in 16 bits; 8 x 128 fp32 weights; 32 heads of 128 x 128
    selection = registry.load("memory_selection")
    case = pick("memory_selection", "512 references of 128")
    (weights, *_) = selection.variants(case, selection.build(case, "meta", 0), Setup("cpu"))
    assert weights.work == Work(512 * (128 * 40 * 256 + 4096), 2 * 512 * 32 * 128**3)
    assert floor_us(weights.work) == pytest.approx(156.6, rel=1e-3)
    # five references of 8 tokens and 8 heads of 128: 81,920 bytes in and out, 1,280 of positions, 20 of page numbers
    reposition = sys.modules["benchmarks.kernels.reposition"]
    assert reposition.work(pick("reposition", "load 5 pages of 8")) == Work(2 * 81920 + 1280 + 20, 3 * 40960)
    # the pool's keys: 12,800 tokens of 8 heads of 128, in and out, with two positions each
    assert reposition.work(pick("reposition", "move 12800 tokens")).bytes == 2 * 26214400 + 2 * 409600 + 400
    # five references: 81,920 numbers from int8 to bf16, scales for 128 channels and 8 tokens of 40 heads
    codec = sys.modules["benchmarks.kernels.block_codec"]
    assert codec.work(pick("block_codec", "read 5 references of 8"), "int8") == Work(81920 * 3 + 40 * 136 * 2, 81920)


OFFICIAL = """
from __future__ import annotations
from dataclasses import dataclass
import torch
@dataclass(frozen=True)
class Support:
    supported: bool
def triton_affine_scan(state, q, k, v, keep, erase, write):
    assert state.dim() == q.dim() == 3 and all(x.is_contiguous() for x in (q, k, v))
    reads = []
    for t in range(q.shape[1]):
        reads.append(torch.einsum("bij,bj->bi", state, q[:, t]))
        seen = torch.einsum("bij,bj->bi", state, k[:, t])
        step = (write[:, t] * v[:, t] - erase[:, t] * seen)[:, :, None] * k[:, t, None]
        state = keep[:, t, :, None] * state + step
    return state, torch.stack(reads, 1)
"""


def test_the_official_scan_is_given_its_own_shapes(tmp_path):
    """Heads go into its batch; it is found in a checkout, and asked for where there is none."""
    case = pick("delta_rule", "decode x32, 4 state heads", dtype="fp32")
    case.sizes["queries"] = 3
    layer = delta_rule.build(case, "cpu", 0)
    inputs = delta_rule.activate(layer.projections, layer.batch.gate_bias, delta_rule.spec_of(case))
    inputs = delta_rule.DeltaRuleInputs(*(x.unflatten(0, (32, 3)) for x in inputs))
    start = delta_rule.start_states(case, layer)
    with pytest.raises(ImportError, match="--official"):
        delta_rule_baselines.official_scan(case, inputs, start, Setup("cuda"))
    with pytest.raises(ImportError, match=r"affine_scan\.py is not there"):
        delta_rule_baselines.official_scan(case, inputs, start, Setup("cuda", tmp_path / "nowhere"))
    (tmp_path / "deltamem/kernels").mkdir(parents=True)
    (tmp_path / "deltamem/kernels/affine_scan.py").write_text(OFFICIAL)
    (scan,) = delta_rule_baselines.official_scan(case, inputs, start, Setup("cuda", tmp_path))
    assert scan.gate.error(scan.call()) < 1e-6
    assert scan.gate.error((scan.call()[0] * 1.001, scan.call()[1])) > scan.gate.tolerance
