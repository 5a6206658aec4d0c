"""The pool's Prometheus metrics. ``tier``: where an entry lay: "device", "host" or "disk"."""

from __future__ import annotations

from collections import Counter as Counts
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

POOL_HITS = Counter("mem_triton:pool_hits", "Entries that a request found where it looked for them", ["tier"])
POOL_MISSES = Counter("mem_triton:pool_misses", "Entries that had to come from a tier below", ["tier"])
POOL_EVICTIONS = Counter("mem_triton:pool_evictions", "Entries that made room for others", ["tier"])
POOL_BYTES = Counter("mem_triton:pool_bytes", "Bytes brought to the device, by the tier they came from", ["tier"])
POOL_FAILURES = Counter("mem_triton:pool_failures", "Entries that could not be brought to the device")
POOL_USED_BYTES = Gauge("mem_triton:pool_used_bytes", "Bytes that entries take", ["tier"], multiprocess_mode="livesum")
POOL_PINNED_PAGES = Gauge(
    "mem_triton:pool_pinned_pages", "Device pages that running requests or defaults hold", multiprocess_mode="livesum"
)
POOL_WAITING = Gauge(
    "mem_triton:pool_waiting_requests", "Requests that wait until pages are released", multiprocess_mode="livesum"
)
POOL_FETCH_SECONDS = Histogram(
    "mem_triton:pool_fetch_seconds",
    "From the decision to fetch an entry until its pages are filled, by the tier it came from",
    ["tier"],
    buckets=(5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5, 2.0),
)


class Tally:
    """One pool's own counts ("hits.device", ...) beside the process's metrics. Not thread-safe."""

    def __init__(self) -> None:
        self.counts: Counts[str] = Counts()

    def add(self, metric: Any, what: str, tier: str, amount: int = 1) -> None:
        """Count ``amount`` here and in ``metric``."""
        self.counts[f"{what}.{tier}"] += amount
        metric.labels(tier).inc(amount)
