"""Between the residency's decisions and the workers that carry them out: orders go out, answers come back.

Engine-neutral and without input or output of its own; an engine's front end sends the orders over its RPC::

    if orders := courier.orders():
        rpc("load_pages", orders)             # courier.undelivered(orders) if it raised
    if courier.busy:
        courier.settle(rpc("pages_state", courier.heard()))

Both calls can be made again: a worker takes an order once, and repeats what it has loaded until it hears that the
front end knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mem_triton import metrics
from mem_triton.store.pool.page_load import PageLoad
from mem_triton.store.pool.residency import Residency


class PageCourier:
    """Keeps count of which workers have filled which entry's pages."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._answers: dict[str, dict[int, str | None]] = {}  # reference under way -> worker -> None or its error
        self._heard: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether loads are under way."""
        return bool(self._answers)

    def orders(self) -> list[PageLoad]:
        """Loads that the workers have not been told of."""
        orders = self._residency.take_loads()
        self._answers |= {load.ref: {} for load in orders}
        self._heard -= {load.ref for load in orders}  # what a worker says of them from now on is news
        return orders

    def undelivered(self, orders: Iterable[PageLoad]) -> None:
        """The call that carried these orders failed: they are handed out again."""
        self._residency.put_back(orders)

    def heard(self) -> list[str]:
        """References whose loads the workers need not report any more."""
        return sorted(self._heard)

    def settle(self, answers: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
        """One answer a worker. "finished": what it has loaded and was not told to forget, each with None or its error;
        "stats": its counts, for ``/metrics``.

        An entry is loaded when all workers say so. If one failed, its pages are free once all are through with it.
        """
        self._heard.clear()
        for worker, answer in enumerate(answers):
            for ref, error in answer["finished"].items():
                if ref in self._answers:
                    self._answers[ref][worker] = error
                else:
                    self._heard.add(ref)  # said before
            for what, count in answer["stats"].items():
                metrics.WORKER_POOL.labels(str(worker), what).set(count)
        for ref in [ref for ref, given in self._answers.items() if len(given) == len(answers)]:
            self._heard.add(ref)
            errors = [error for error in self._answers.pop(ref).values() if error]
            if errors:
                self._residency.failed(ref, errors[0])
            else:
                self._residency.loaded(ref)
