"""Between the residency's decisions and the workers that carry them out: orders go out, answers come back.

Engine-neutral and without input or output of its own; an engine's front end sends the orders over its RPC::

    if orders := courier.orders():
        rpc("load_pages", orders)
    if courier.busy:
        courier.settle(rpc("pages_state"))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mem_triton.runtime import counters
from mem_triton.runtime.residency import Residency

Order = tuple[str, list[int], int]
"""(reference, its pages in order, its tokens): one entry that every worker loads."""


class PageCourier:
    """Keeps count of which workers have filled which entry's pages."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._answers: dict[str, list[str | None]] = {}  # reference under way -> an answer a worker: None or its error

    @property
    def busy(self) -> bool:
        """Whether loads are under way."""
        return bool(self._answers)

    def orders(self) -> list[Order]:
        """Loads that the workers have not been told of."""
        loads = self._residency.take_loads()
        self._answers |= {load.ref: [] for load in loads}
        return [(load.ref, list(load.pages), load.tokens) for load in loads]

    def settle(self, answers: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
        """One answer a worker. "finished": what it has loaded since it was last asked, each with None or its error;
        "stats": its counts, for ``/metrics``.

        An entry is loaded when all workers say so. If one failed, its pages are free once all are through with it.
        """
        for worker, answer in enumerate(answers):
            for ref, error in answer["finished"].items():
                self._answers[ref].append(error)
            for what, count in answer["stats"].items():
                counters.WORKER_POOL.labels(str(worker), what).set(count)
        for ref in [ref for ref, given in self._answers.items() if len(given) == len(answers)]:
            errors = [error for error in self._answers.pop(ref) if error]
            if errors:
                self._residency.failed(ref, errors[0])
            else:
                self._residency.loaded(ref)
