"""Watch an engine's worker on a CPU, with our kernels interpreted: does serving launch what the warm-up did not?

A test's tamper, as ``kernels_on_cpu``. Attention takes the way that it would take on a GPU. Launches that the warm-up
did not have are printed after COLD, the kernels that served after SERVED, each once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.support import kernels_on_cpu
from tests.support.specialisations import Key, recorded

COLD, SERVED, WARMED, MISSED = "COLD-LAUNCH", "SERVED-BY", "WARMED-UP", "WOULD-BE-COLD"
NO_PAGES = f"({', '.join(['None'] * 9)})"  # a tuple of None
FORGETFUL: dict[str, Callable[[Key], bool]] = {
    "no long prompts": lambda key: key[0] == "chunk_maps_kernel",
    "no steps of one token": lambda key: key[0] == "recurrent_kernel",
    "no memory": lambda key: key[0] == "attention_kernel" and ("pages", NO_PAGES) not in key,
}
"""Controls: what a warm-up might leave out. Serving says MISSED, and which, if it would have met a cold launch then."""


def vllm() -> None:
    """Runner V2, as on a GPU: what was registered with vLLM's own registry is warmed up by it."""
    kernels_on_cpu.attention_inputs()
    _attention_as_on_a_gpu()
    from vllm.v1.worker.cpu_worker import CPUWorker

    stock = CPUWorker.compile_or_warm_up_model

    def compile_or_warm_up_model(self: Any) -> Any:
        result = stock(self)
        _watch(self.model_runner.jit_warmup_registry.warmup)
        return result

    CPUWorker.compile_or_warm_up_model = compile_or_warm_up_model


def sglang() -> None:
    """SGLang warms up where it makes its attention backend."""
    kernels_on_cpu.sglang_as_on_a_gpu()
    _attention_as_on_a_gpu()
    from mem_triton_sglang import backend, warmup

    stock = backend.create

    def create(runner: Any) -> Any:
        made = stock(runner)
        _watch(lambda: warmup.warm_up(made, runner))
        return made

    backend.create = create


def _watch(warm_up: Callable[[], None]) -> None:
    warm: set[Key] = set()
    said: set[str] = set()

    def say(line: str) -> None:
        if line not in said:
            said.add(line)
            print(line, flush=True)

    def serve(key: Key) -> None:
        say(f"{SERVED} {key[0]}")
        if key not in warm:
            near = min(warm, key=lambda other: len(set(key) ^ set(other)))
            say(f"{COLD} {key[0]} {sorted(map(str, set(key) - set(near)))}")
        for control, forgets in FORGETFUL.items():
            if forgets(key):
                say(f"{MISSED} {control}")

    with recorded(warm.add, launch=False):
        warm_up()
    say(f"{WARMED} {len(warm)}")
    _KEPT.append(recorded(serve, launch=True))
    _KEPT[-1].__enter__()


_KEPT: list[Any] = []  # what is recorded until the process ends


def _attention_as_on_a_gpu() -> None:
    """The way that the op takes on an H200, which the batch chooses."""
    from mem_triton.ops.memory_attention.cascade import batched
    from mem_triton.ops.memory_attention.cpu import dispatch
    from mem_triton.ops.memory_attention.fused import launch
    from mem_triton.ops.memory_attention.op import memory_attention
    from mem_triton.ops.memory_attention.planned import PlannedLayer
    from mem_triton.ops.memory_attention.policy import choose_for

    launch.architecture = lambda device: "sm90"
    from mem_triton.ops.memory_attention.cascade import launch as cascade_launch

    cascade_launch.architecture = launch.architecture

    def attend(call: Any) -> None:
        path = batched if choose_for("sm90", call).route == "shared_batched" else launch
        path.attend(kernels_on_cpu.by_token(call))

    dispatch.attend = attend
    PlannedLayer.attend = lambda self, query, out, cache, plans, make: memory_attention(make())
