"""What must not run: Triton version x architecture x kernel, each with the upstream issue, and what runs instead.

An entry is here when a released Triton compiles a kernel wrongly, or not at all, under conditions that a configuration
of ours meets; the tuning tables stay as if there were no such Triton. Nobody has seen a wrong result of our kernels.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from mem_triton import compat
from mem_triton.ops.tuning.memory_attention_fused import FusedConfig

logger = logging.getLogger(__name__)

APPLIED: Counter[str] = Counter()
"""Entry name -> configurations that it has replaced in this process."""

ATTENTION = ("attention", "shared", "pages")
TRITON = "https://github.com/triton-lang/triton/"


@dataclass(frozen=True)
class Entry:
    """One denied combination of a kernel with its configuration.

    triton: versions that have the bug. block_m, warps: from how many on. rest: only heads of two parts (80 = 64 + 16).
    what: the bug; issue: where it is described.
    """

    name: str
    triton: str
    architectures: tuple[str, ...]
    kernels: tuple[str, ...]
    what: str
    issue: str
    block_m: int = 64  # from here on Hopper and Blackwell multiply asynchronously
    warps: int = 1
    rest: bool = False

    def hits(self, triton: str, architecture: str, kernel: str, size: int, config: FusedConfig) -> bool:
        """Whether a configuration for heads of ``size`` channels is denied under this version of Triton."""
        return (
            architecture in self.architectures
            and kernel in self.kernels
            and config.block_m >= self.block_m
            and config.warps >= self.warps
            and (not self.rest or size & (size - 1) != 0)
            and compat.lies_in(triton, self.triton)
        )


ENTRIES = (
    Entry(
        "wgmma of two warp groups",
        ">=3.6,<3.9",
        ("sm90",),
        ATTENTION,
        "waiting for wgmma does not wait for the other warp group, whose operands may then be overwritten",
        TRITON + "issues/11047",
        warps=8,
    ),
    Entry(
        "tcgen05 in loops",
        ">=3.6,<3.7",
        ("sm100", "sm103"),
        ATTENTION,
        "products in a loop whose length is not known are not deterministic, for want of barriers",
        TRITON + "issues/9871",
    ),
    Entry(
        "two products into one tcgen05 accumulator",
        ">=3.6,<3.9",
        ("sm100", "sm103"),
        ATTENTION,
        "a loop that adds two products to one accumulator gives wrong results; heads of two parts do",
        TRITON + "issues/10821",
        rest=True,
    ),
)

WATCHED = {
    TRITON + "pull/11781": "ptxas before 13.3 may reuse the registers of a wgmma operand too early (sm90, Triton < "
    "3.9); it does so in none of our kernels, as disassembled under Triton 3.6 and 3.9",
    "https://github.com/fla-org/flash-linear-attention/pull/1262": "ptxas 12.8 assembles other delta-rule kernels "
    "wrongly (sm90, Triton < 3.8); they multiply on tensor cores, ours does not",
    TRITON + "issues/9610": "no proxy fence between the copies that fill shared memory and the wgmma that reads it "
    "(sm90, Triton < 3.7.1): so in what 3.6 makes of our blocks of 64 rows, not in what 3.9 makes; nobody has seen a "
    "wrong result of it, and tests/gpu repeats such steps a thousand times, with blocks of 32 rows beside them",
    TRITON + "issues/9728": "tl.range(warp_specialize=True) over pointer loads crashes the compiler on sm90, in all "
    "versions; no kernel asks for it",
}
"""Issues that were looked at and deny nothing, and why not."""


def denials(triton: str | None, architecture: str) -> list[Entry]:
    """The entries that can hit on this architecture under this version of Triton; None = the installed one."""
    triton = triton or installed()
    return [e for e in ENTRIES if architecture in e.architectures and compat.lies_in(triton, e.triton)]


@functools.lru_cache(maxsize=1024)
def allowed(
    kernel: str,
    select: Callable[[str, int, int, int], FusedConfig],
    architecture: str,
    size: int,
    item_bytes: int,
    rows: int,
    group: int = 1,
    triton: str | None = None,
) -> FusedConfig:
    """``select(architecture, size, item_bytes, rows)``, or what runs instead of it where that is denied.

    Instead runs the configuration of a smaller batch: 256 rows, which give one warp group 64 of them, or 32, which go
    to mma.sync. kernel: "attention", "shared" or "pages". group: see ``FusedConfig.holding``. A denial is logged once
    for each configuration, and counted; ValueError where nothing is left.
    """

    def choose(rows: int) -> FusedConfig:
        return select(architecture, size, item_bytes, rows).holding(group)

    triton = triton or installed()
    wanted = choose(rows)
    denied = [e for e in ENTRIES if e.hits(triton, architecture, kernel, size, wanted)]
    for fewer in (256, 32) if denied else ():
        config = choose(min(rows, fewer))
        if any(e.hits(triton, architecture, kernel, size, config) for e in ENTRIES):
            continue
        for entry in denied:
            APPLIED[entry.name] += 1
            logger.warning(
                "mem_triton: %s kernel, heads of %d on %s: %d rows and %d warps a program instead of %d and %d, "
                "because of Triton %s: %s (%s)",
                kernel,
                size,
                architecture,
                config.block_m,
                config.warps,
                wanted.block_m,
                wanted.warps,
                triton,
                entry.what,
                entry.issue,
            )
        return config
    if denied:
        raise ValueError(
            f"{denied[0].name}: Triton {triton} leaves {kernel} nothing that may run on {architecture} for heads of "
            f"{size} in groups of {group}; install a Triton that is not {denied[0].triton} ({denied[0].issue})"
        )
    return wanted


def installed() -> str:
    version = compat.installed_version("triton")
    return "0" if version is None else str(version)
