"""``benchmarks.engines``: commands, pairs, and above all that no speed is said behind a red gate."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.common.server import BenchmarkError
from benchmarks.engines import app, commands, made_up, memories, report, requirements
from benchmarks.engines.commands import Cell, Setting
from benchmarks.engines.floor import Machine, decode_floor_ms
from benchmarks.engines.gate import Answer, Oracle, remembering
from benchmarks.engines.memories import STOCK, Comparison, Memory
from benchmarks.engines.pairs import Deadline, order, ratio, run_pairs
from benchmarks.engines.sides import KV_TOKENS, Side

SECTION = {"delta": {"adapter": "/a"}}


def setting(**fields) -> Setting:
    return Setting(Path("/m"), "float32", 512, 16, gpu=False, **fields)


class Clock:
    """Seconds that pass when something runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# commands


@pytest.mark.parametrize("engine", ["vllm host", "vllm server", "sglang"])
def test_both_sides_have_the_same_command_but_memorys_flags(engine, tmp_path):
    launch = {"vllm host": commands.vllm_host, "vllm server": commands.vllm_server, "sglang": commands.sglang_server}
    if engine == "sglang":
        stock, memory = (commands.sglang_memory(s, tmp_path / "mem.yaml") for s in (None, SECTION))
        assert memory.options == ["--attention-backend", "mem_triton"]
        assert json.loads(Path(memory.environment["MEM_TRITON_CONFIG"]).read_text()) == SECTION
        assert stock.environment == {"MEM_TRITON_CONFIG": ""}, "one of the user's own would give it memory"
    else:
        stock, memory = commands.vllm_memory(None), commands.vllm_memory(SECTION)
        assert memory.options[:2] == ["--load-format", "mem_triton"]
        assert json.loads(memory.options[3]) == {"mem_triton": SECTION} and stock.environment == memory.environment
    assert stock.options == []
    words = launch[engine](setting(eager=True, extra=("--seed", "3"))).command
    assert words[-2:] == ["--seed", "3"] and str(Path("/m")) in words


def test_repeats_cannot_profit_from_each_other():
    """Random prompts of the same seed must not be found in a prefix cache."""
    assert "--no-enable-prefix-caching" in commands.vllm_engine(setting())
    assert "--disable-radix-cache" in commands.sglang_server(setting()).command


def test_the_tools_are_asked_for_the_cell():
    cell, file = Cell(16, 128, 32), Path("/r/x.json")
    latency = commands.typed(["/bin/vllm", "bench", "latency", *commands.bench_latency(cell, 3, 1, file)])
    assert latency.startswith("vllm bench latency --input-len 128 --output-len 32 --batch-size 16 --num-iters 3")
    throughput = commands.bench_throughput(cell, 7, file)
    assert [throughput[throughput.index(k) + 1] for k in ("--num-prompts", "--seed")] == ["16", "7"]
    for tool in (commands.bench_serve, commands.bench_sglang):
        words = tool("http://h:1", Path("/m"), cell.longer(640), 4, 2, file)
        named = {k: words[words.index(k) + 1] for k in ("--num-prompts", "--max-concurrency", "--random-input-len")}
        assert named == {"--num-prompts": "64", "--max-concurrency": "16", "--random-input-len": "768"}


def test_what_is_compared():
    assert memories.comparisons(["delta", "text"], "latency") == [
        Comparison("delta", "delta"),
        Comparison("memory instead of text", "explicit", more=640),
    ]
    assert memories.comparisons(["delta"], "pool") == [Comparison("shared pool", "pool", "pool per request")]
    with pytest.raises(ValueError, match="--memory deltas: choose from delta"):
        memories.comparisons(["deltas"], "latency")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["latencies"], "is no part on vllm"),
        (["latency", "--engine", "sglang"], "is no part on sglang"),
        (["--memory", "x"], "--memory x"),
        (["--output", "1"], "--output"),
    ],
)
def test_bad_words_are_refused(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        app.parse(words)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_missing_packages_are_named_with_what_to_install(monkeypatch, capsys):
    found = {"sglang", "mem_triton_sglang", "transformers"}
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: name in found or None)
    with pytest.raises(SystemExit):
        app.main(["serve", "--engine", "sglang"])
    assert "datasets" in (said := capsys.readouterr().err) and "-m pip install -e '.[bench]'" in said
    with pytest.raises(BenchmarkError, match=r"no vllm, mem_triton_vllm.*make env"):
        requirements.require("vllm")


@pytest.mark.parametrize(
    "line", ["INFO GPU KV cache size: 349,504 tokens", "max_total_num_tokens=349504, chunked_prefill_size=64"]
)
def test_the_log_says_how_much_fits(line):
    assert "".join(KV_TOKENS.findall(line)[-1]).replace(",", "") == "349504"


# pairs


def test_runs_alternate_and_pairs_are_whole():
    ran, clock = [], Clock()

    def run(side: str):
        def one(repeat: int) -> dict[str, float]:
            ran.append((side[0], repeat))
            clock.now += 25
            return {"decode_ms": 1.0}

        return one

    found, longest = run_pairs({s: run(s) for s in ("baseline", "memory")}, 5, Deadline(None, clock))
    assert [side for side, _ in ran] == list("bmmbbmmbbm") and [r for _, r in ran] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len(found["baseline"]) == len(found["memory"]) == 5 and longest == 50
    ran.clear()
    found, _ = run_pairs({s: run(s) for s in ("baseline", "memory")}, 5, Deadline(3, clock))
    assert len(ran) == 6 and len(found["memory"]) == 3, "180 s hold three pairs of 50 s, and no fourth one"


def test_order_is_stock_memory_memory_stock():
    assert [order(i)[0] for i in range(4)] == ["baseline", "memory", "baseline", "memory"]


def test_the_ratio_is_that_of_pairs():
    """A machine that slows down by half does not show in the ratio, though it does in the medians."""
    found = ratio([1, 1, 1, 2, 2, 2], [1.1, 1.1, 1.1, 2.2, 2.2, 2.2])
    assert found.median == pytest.approx(1.1) == found.low == found.high and found.pairs == 6
    noisy = ratio([1] * 9, [0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6])
    assert noisy.min == 0.8 <= noisy.low < noisy.median == 1.2 < noisy.high <= 1.6 == noisy.max
    two = ratio([1, 1], [0.9, 1.1])
    assert (two.median, two.low, two.high, two.min) == (1.0, None, None, 0.9), "two pairs are no interval"
    with pytest.raises(ValueError, match="no pair"):
        ratio([], [])


def test_a_row_says_how_much_faster_memory_is():
    cell = Cell(4, 128, 32)
    nan = float("nan")
    found = {
        "baseline": [
            {"decode_ms": 2.0, "output_tokens_per_s": 100.0},
            {"decode_ms": nan, "output_tokens_per_s": 100.0},
        ],
        "memory": [{"decode_ms": 4.0, "output_tokens_per_s": 80.0}, {"decode_ms": 4.0, "output_tokens_per_s": 90.0}],
    }
    metrics = report.row("latency", Comparison("delta", "delta"), cell, found, {"gate": "green"}, 1.0)["metrics"]
    assert metrics["decode_ms"]["speed"]["median"] == 0.5 and metrics["decode_ms"]["baseline"] == [2.0]
    assert metrics["output_tokens_per_s"]["speed"]["median"] == pytest.approx(0.85)


# gates


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_up.make_model("qwen3-tiny", tmp_path_factory.mktemp("made"), torch.float32)


@pytest.fixture(scope="module")
def kinds(made, tmp_path_factory) -> dict[str, Memory]:
    folder = tmp_path_factory.mktemp("memories")
    names = (STOCK, "delta", "explicit", "pool", "pool per request")
    return {name: memories.make_memory(name, made, folder / name, pool_tokens=96) for name in names}


@pytest.fixture
def oracle(made) -> Oracle:
    return Oracle(made.model, exact=True)


def engine(made, memory: Memory | None, prompts: list[list[int]], count: int = 4) -> list[Answer]:
    """What a right engine answers: transformers, a token at a time."""
    answers = []
    for prompt in prompts:
        tokens, logprobs = [], []
        for _ in range(count):
            with torch.inference_mode(), remembering(made.model, memory):
                logits = made.model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1]
            tokens.append(int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(-1)[tokens[-1]]))
        answers.append(Answer(tokens, logprobs))
    return answers


@pytest.mark.parametrize("name", [STOCK, "delta", "explicit", "pool", "pool per request"])
def test_a_right_engine_is_green_and_one_without_its_memory_is_red(made, kinds, oracle, name):
    verdict = oracle.judge(engine(made, kinds[name], oracle.prompts), kinds[name])
    assert verdict.green and verdict.equal == verdict.tokens == 12, verdict
    if name != STOCK:
        assert verdict.effect > 0.01
        dropped = oracle.judge(engine(made, None, oracle.prompts), kinds[name])
        assert not dropped.green and "differ from transformers'" in dropped.reason


def test_one_wrong_token_makes_a_gate_red(made, kinds, oracle):
    answers = engine(made, None, oracle.prompts)
    tokens = [*answers[1].tokens[:-1], (answers[1].tokens[-1] + 1) % 10000]
    wrong = [answers[0], Answer(tokens, answers[1].logprobs), answers[2]]
    assert not oracle.judge(wrong, kinds[STOCK]).green
    unsure = [Answer(a.tokens, [x + 0.01 for x in a.logprobs]) for a in answers]
    assert not oracle.judge(unsure, kinds[STOCK]).green
    broken = [Answer(a.tokens, [float("nan")] * 4) for a in answers]
    assert "NaN" in oracle.judge(broken, kinds[STOCK]).reason


def test_a_memory_that_changes_nothing_makes_a_gate_red(made, kinds, oracle, tmp_path):
    """Negative control of the gate itself: with such a memory it could not tell a broken engine from a right one."""
    from mem_triton.systems.delta_mem import save_adapter
    from tests.support.models import random_adapter

    nothing = save_adapter(random_adapter(made.model, strength=0.0, delta_heads=("q", "o")), tmp_path / "nothing")
    memory = Memory("delta", {"delta": {"adapter": str(nothing)}}, nothing)
    verdict = oracle.judge(engine(made, memory, oracle.prompts), memory)
    assert not verdict.green and "too little to be seen" in verdict.reason


def test_in_16_bits_the_stock_engines_error_is_the_measure(made, kinds, oracle):
    oracle.exact = False  # as with a model of 16 bits; the numbers here stay those of fp32
    answers = engine(made, None, oracle.prompts)
    assert oracle.judge([Answer(a.tokens, [x + 0.05 for x in a.logprobs]) for a in answers], kinds[STOCK]).green
    own = engine(made, kinds["delta"], oracle.prompts)
    close = [Answer(a.tokens, [x + 0.1 for x in a.logprobs]) for a in own]
    far = [Answer(a.tokens, [x + 0.2 for x in a.logprobs]) for a in own]
    close, far = (oracle.judge(answers, kinds["delta"]) for answers in (close, far))
    assert close.budget == pytest.approx(0.12, abs=1e-3) and not close.reason.startswith("log-probabilities")
    assert far.reason.startswith("log-probabilities differ")


# a whole run, on engines that are transformers


class FakeSide(Side):
    """As an engine's side, at once: answers as ``memory`` says, and is twice as slow with it."""

    def __init__(self, made, name: str, memory: Memory | None, folder: Path) -> None:
        nothing = SimpleNamespace(pid=1)
        log = folder / "log"
        log.write_text("GPU KV cache size: 1,000 tokens")
        server = SimpleNamespace(
            name=name,
            log=log,
            process=nothing,
            shown_command=name,
            start=lambda: None,
            wait=lambda show: None,
            stop=lambda: None,
            ask_to_stop=lambda: None,
        )
        super().__init__(server, None, folder)
        self.made, self.memory = made, memory

    def greedy(self, prompts, tokens):
        return engine(self.made, self.memory, prompts, tokens)

    def measure(self, part, cell, repeat):
        return {"decode_ms": (1.0 if self.name == STOCK else 2.0) * cell.batch}


@pytest.fixture
def on_fakes(monkeypatch, tmp_path):
    """Runs ``main``. forgets: engines that drop their memory. Returns (exit code, report, CSV lines)."""

    def run(*words: str, forgets: tuple[str, ...] = ()):
        def side(course, name, served):
            memory = None if name in forgets else course.memories[name]
            return FakeSide(course.made, name, memory, course.folder)

        monkeypatch.setattr(app.Course, "_side", side)
        monkeypatch.setattr(app.Course, "_client", lambda course: None)
        monkeypatch.setattr(app, "ToolHost", lambda *_: FakeSide(None, "client", None, tmp_path).server)
        monkeypatch.setattr(app, "require", lambda engine: None)
        monkeypatch.setattr(app, "REST", 0)
        monkeypatch.setattr(app, "measure_machine", lambda dtype, threads: Machine(1e10, 1e11, threads))
        monkeypatch.setattr(app, "RESULTS", tmp_path)
        with pytest.raises(SystemExit) as end:
            app.main(
                ["--model", "qwen3-tiny", "--output", "8", "--repeats", "3", "--pool-tokens", "64", "--save", *words]
            )
        files = sorted(tmp_path.glob("engines-*.json"))
        kept = json.loads(files[0].read_text()) if files else None
        lines = list(csv.DictReader(files[0].with_suffix(".csv").open())) if files else []
        return end.value.code, kept, lines

    return run


def test_a_run_keeps_ratios_machine_and_commands(on_fakes, capsys):
    code, kept, lines = on_fakes("latency", "--memory", "delta", "text", "--batches", "1", "16", "--contexts", "32")
    assert code == 0 and [(r["memory"], r["batch"]) for r in kept["rows"]] == [
        ("delta", 1),
        ("delta", 16),
        ("explicit", 1),
    ]
    assert all(r["metrics"]["decode_ms"]["speed"]["median"] == 0.5 for r in kept["rows"])
    assert {"machine", "versions", "commit", "command", "gates", "commands", "memory_held"} <= set(kept)
    assert [line["speed"] for line in lines] == ["0.5"] * 3 and lines[0]["gate"] == "green"
    (missing,) = kept["missing"]
    assert "batch 16" in missing and "needs 10880 tokens of KV cache, stock has 1000" in missing
    assert "0.500" in capsys.readouterr().out


def test_a_red_gate_gives_no_speed_and_exit_code_1(on_fakes, capsys):
    words = ("latency", "--memory", "delta", "explicit", "--batches", "4", "--contexts", "32")
    code, kept, lines = on_fakes(*words, forgets=("delta",))
    assert code == 1
    red, green = kept["rows"]
    assert (red["gate"], red["metrics"]) == ("red", {}) and green["metrics"]["decode_ms"]["speed"]["median"] == 0.5
    assert kept["gates"]["delta"]["reason"] and lines[0]["speed"] == "" and lines[0]["gate"] == "red"
    shown = capsys.readouterr().out
    assert "gate red" in shown and len(re.findall(r"0\.500 \[", shown)) == 1


def test_a_pool_is_compared_with_one_that_each_request_reads(on_fakes):
    code, kept, _ = on_fakes("pool", "--batches", "4", "--contexts", "32")
    (row,) = kept["rows"]
    assert code == 0 and (row["memory"], row["baseline"], row["part"]) == ("pool", "pool per request", "pool")
    assert set(kept["gates"]) == {"pool", "pool per request"}


def test_a_red_baseline_is_no_baseline(on_fakes):
    code, kept, _ = on_fakes("pool", "--batches", "4", "--contexts", "32", forgets=("pool per request",))
    assert code == 1 and [(r["gate"], r["metrics"]) for r in kept["rows"]] == [("red", {})]


def test_what_does_not_fit_in_time_is_said(on_fakes):
    code, kept, _ = on_fakes("latency", "--batches", "1", "--contexts", "32", "--limit-minutes", "0")
    assert code == 0 and kept is None, "nothing was measured, nothing is kept"


def test_the_floor_counts_weights_once_and_keys_of_every_request(made):
    machine = Machine(bytes_per_s=1e9, flops=1e15, threads=1)
    c = made.model.config
    one, many = (decode_floor_ms(made, Cell(batch, 100, 8), machine) for batch in (1, 11))
    keys = 4 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 104  # bytes a request
    assert 1e6 * (many - one) == pytest.approx(10 * keys)
    words = c.vocab_size * c.hidden_size
    weights = sum(p.numel() for p in made.model.parameters()) - words
    assert 1e6 * one == pytest.approx(4 * weights + keys)
    slow = Machine(bytes_per_s=1e15, flops=1e9, threads=1)
    assert 1e6 * decode_floor_ms(made, Cell(8, 1, 0), slow) == pytest.approx(16 * weights, rel=0.01)


# on the real engine


@pytest.mark.slow
@pytest.mark.engine
def test_vllm_bench_latency_on_a_real_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(app, "RESULTS", tmp_path)
    with pytest.raises(SystemExit) as end:
        app.main(
            [
                "latency",
                "throughput",
                "--model",
                "qwen3-tiny",
                "--batches",
                "2",
                "--contexts",
                "32",
                "--output",
                "8",
                "--repeats",
                "2",
                "--eager",
                "--save",
            ]
        )
    (path,) = tmp_path.glob("engines-vllm-*.json")
    kept = json.loads(path.read_text())
    assert end.value.code == 0, kept["gates"]
    latency, throughput = kept["rows"]
    assert (
        len(latency["metrics"]["latency_ms"]["memory"])
        == len(throughput["metrics"]["output_tokens_per_s"]["memory"])
        == 2
    )
    assert kept["gates"]["delta"]["effect"] > 0.01 and kept["gates"]["stock"]["gate"] == "green"
    assert "vllm bench latency --model" in kept["commands"]["delta, latency"]
    assert kept["memory_held"]["delta"]["resident_gib"] > 0.1
