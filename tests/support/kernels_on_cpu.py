"""Run our Triton kernels, through the interpreter, where an engine's CPU worker would run its own code.

Called in an engine's processes, as a test's tamper, with ``TRITON_INTERPRET=1``. Each kind of kernel says once that it
ran.
"""

from __future__ import annotations

from tests.support import interp

RAN = "KERNEL-RAN"


def both() -> None:
    delta_rule()
    memory_attention()


def delta_rule() -> None:
    """δ-mem's scan and its single step."""
    interp.install()  # before anything imports the kernels
    from mem_triton.ops.delta_rule import launch, paged_numba
    from mem_triton.ops.tuning.delta_rule import select

    def step_rows(*arguments) -> None:
        *_, spec, _, _, longest = arguments
        config = select("sm90", spec.rank)
        launch.step_rows(*arguments, config)
        _say("scan" if longest > config.max_recurrent else "step")

    paged_numba.step_rows = step_rows


def memory_attention() -> None:
    """The fused attention kernel."""
    interp.install()
    from mem_triton.ops.memory_attention import launch, paged_torch

    launch.architecture = lambda device: "sm90"

    def attend(*arguments, **options) -> None:
        launch.attend(*arguments, **options)
        _say("attention")

    paged_torch.attend = attend


_said: set[str] = set()


def _say(kind: str) -> None:
    if kind not in _said:
        _said.add(kind)
        print(f"{RAN} {kind}", flush=True)
