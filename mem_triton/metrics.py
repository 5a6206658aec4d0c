"""Prometheus metrics of front ends, beside the pool's in ``store.pool.metrics``.

An engine that serves ``/metrics`` from this process's default registry shows them.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

COMMITS = Counter("mem_triton:session_commits", "Session states committed")
REFUSALS = Counter("mem_triton:refusals", "Requests refused because of their memory fields", ["field"])
COMMIT_FAILURES = Counter("mem_triton:session_commit_failures", "Session states that could not be committed")
LATE_COMMITS = Counter(
    "mem_triton:session_late_commits",
    "Commits that include tokens after a stop string, because the engine had run ahead of the front end",
)
REFRESH_OFF = Counter(
    "mem_triton:refresh_off", "Requests whose references stay as they are while they answer, and why", ["reason"]
)
INCIDENTS = Counter("mem_triton:incidents", "Requests that lost their memory in a worker and failed", ["where"])
SEARCH_FAILURES = Counter(
    "mem_triton:search_failures", "Requests answered without references because their search failed", ["reason"]
)
DEFAULTS_LOST = Counter("mem_triton:defaults_lost", "Default entries that requests are served without")
FEWER_REFERENCES = Counter("mem_triton:fewer_references", "Requests whose references did not all fit")
HEADS_APART = Counter(
    "mem_triton:heads_apart", "Requests that read references of a chat, and whose prompt begins with another head"
)
REFRESH_FAILURES = Counter("mem_triton:refresh_failures", "Refreshes that found no references or no room for them")
WORKER_POOL = Gauge(
    "mem_triton:worker_pool",
    'What each worker counted below its device pages: "hits.host", ...',
    ["worker", "count"],
    multiprocess_mode="livesum",
)
CAPTURES = Counter("mem_triton:captures", "Prompts kept as entries of the bank")
CAPTURE_FAILURES = Counter("mem_triton:capture_failures", "Prompts that could not be kept")
POOL_WRITES = Counter("mem_triton:pool_writes", "Texts written into pools of rows")
POOL_WRITE_FAILURES = Counter("mem_triton:pool_write_failures", "Texts that could not be written into a pool of rows")
POOL_WRITER_WAITS = Counter(
    "mem_triton:pool_writer_waits", "Writes that waited until running requests had ended that read older versions"
)
MEMO_ANSWERS = Counter(
    "mem_triton:memo_answers",
    'Requests to a chat model of MeMo by their end: "answer", "unknown", "error", "full" (HTTP 429), "left"',
    ["ended"],
)
MEMO_CALLS = Counter(
    "mem_triton:memo_calls",
    'Calls of MeMo\'s protocol: to "executive" or "memory"; "replied", "failed" or "cut_off" by the end of the run',
    ["to", "outcome"],
)
MEMO_BUDGETS = Counter("mem_triton:memo_budgets", "Answers of MeMo that a budget ended, by the budget", ["budget"])
MEMO_RUNNING = Gauge(
    "mem_triton:memo_running",
    "Requests to a chat model of MeMo that are worked on or wait",
    multiprocess_mode="livesum",
)
MEMO_SECONDS = Histogram(
    "mem_triton:memo_seconds",
    "From a request to a chat model of MeMo to its answer, the time that it waits included",
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)
