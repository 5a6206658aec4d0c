"""The platform ``torch_cpu_graph``: SGLang's decode graph runner on a CPU, with the graph itself emulated.

Buckets, static buffers, padding and what a backend sees of a replayed batch are SGLang's. Only the CUDA graph is
replaced: a replay calls the captured function again, with the attention backend's attributes as they were when it was
captured. Tensors keep their storage, so a backend that refills its buffers in place computes with the step's data, and
one that puts new tensors in their place computes with the capture's, as in a real graph. Not emulated: host syncs and
changing shapes inside of the captured part, which a real capture refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.model_executor.runner_backend.base_cuda_graph_backend import BaseCudaGraphBackend

REPLAYS = "torch_cpu_graph: replay {}, {} of them padded"
"""Printed with the 1st, 2nd, 4th, 8th... replay, so that a test can see that graphs ran."""


class EmulatedGraphs(BaseCudaGraphBackend):
    """Captured functions by shape, each with the attributes of the attention backends at its capture."""

    def __init__(self, runner: DecodeCudaGraphRunner) -> None:
        self.runner = runner
        self._captured: dict[Any, tuple[Callable[[], Any], list[tuple[Any, dict[str, Any]]]]] = {}
        self._replays = self._padded = 0

    @contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        yield

    @contextmanager
    def replay_session(self) -> Iterator[None]:
        yield

    def capture_one(
        self,
        shape_key: Any,
        forward_fn: Callable[[], Any],
        capture_inputs: Any = None,
        post_warmup_hook: Callable[[], None] | None = None,
    ) -> None:
        for _ in range(2):  # the warm-up runs of a real capture
            forward_fn()
            if post_warmup_hook is not None:
                post_warmup_hook()
        forward_fn()
        self._captured[shape_key] = forward_fn, _attributes(_backends(self.runner.attn_backend))

    def can_run(self, forward_batch: Any, shape_key: Any) -> bool:
        return shape_key in self._captured

    def replay(self, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> Any:
        self._count()
        forward, captured = self._captured[shape_key]
        now = _attributes([backend for backend, _ in captured])
        _restore(captured)
        try:
            return forward()
        finally:
            _restore(now)

    def cleanup(self) -> None:
        self._captured.clear()

    def _count(self) -> None:
        self._replays += 1
        self._padded += self.runner.bs != self.runner.raw_bs
        if self._replays & (self._replays - 1) == 0:
            print(REPLAYS.format(self._replays, self._padded), flush=True)


class EmulatedDecodeGraphRunner(DecodeCudaGraphRunner):
    """SGLang's runner, whose ``_capture`` asks for CUDA streams and a profiler."""

    def _capture(self) -> None:
        self.warmup()
        self._profiler = self.stream = None
        self.buffers.seq_lens.fill_(self.seq_len_fill_value)
        self.buffers.seq_lens_cpu.fill_(self.seq_len_fill_value)
        self.buffers.reset_index_buffers()
        self.backend = EmulatedGraphs(self)
        with self.backend.capture_session(None):
            self._capture_one_stream()

    def _record_in_graph_metadata_prep_done(self) -> None:
        pass


def _backends(backend: Any) -> list[Any]:
    """The backend and those that it is made of, each once."""
    found: list[Any] = []
    waiting = [backend]
    while waiting:
        candidate = waiting.pop()
        if candidate is not None and all(candidate is not one for one in found):
            found.append(candidate)
            waiting += getattr(candidate, "attn_backend_list", None) or []
    return found


def _attributes(backends: list[Any]) -> list[tuple[Any, dict[str, Any]]]:
    return [(backend, dict(vars(backend))) for backend in backends]


def _restore(attributes: list[tuple[Any, dict[str, Any]]]) -> None:
    for backend, values in attributes:
        vars(backend).clear()
        vars(backend).update(values)
