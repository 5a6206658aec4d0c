"""What a request's KV depends on besides its tokens, packed into SGLang's ``extra_key``: the front end writes it, the
radix cache of each scheduler reads it (``radix_keys``).

SGLang appends to an extra key (a LoRA adapter's id), so what follows ours stays part of the namespace.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mem_triton.store.pool.plan import FOREVER, from_carried

_OURS = '["mem_triton'
MARK = f'{_OURS}", '
"""How a key begins that says what its tokens see."""
_NAMESPACE = f"{_OURS} namespace"
_SECRET = os.urandom(16)  # of this front end: nobody outside can search for references whose digests collide


def extra_key_of(
    client_key: str | None, session_key: str | None, bank_key: str | None, plan: Sequence[Sequence[Any]] | None
) -> str | None:
    """The key of one request. plan: as carried (``store.plan.to_carried``); bank_key: the bank as it is served.

    Call it for every request: without memory it is the client's own key, quoted if it imitates one of ours.
    """
    if session_key is None and bank_key is None and not (client_key or "").startswith(_OURS):
        return client_key
    return json.dumps(["mem_triton", client_key, session_key, bank_key, _seen(plan or ())])


@lru_cache(maxsize=1024)
def parse(extra_key: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The namespace of a key with ``MARK``, and (first_token, digest) of each stretch of tokens that sees the same
    references, ascending; digests have 63 bits, 0 is none. Raises ValueError for what ``extra_key_of`` never made."""
    (_, *namespace, stretches), end = json.JSONDecoder().raw_decode(extra_key)
    return json.dumps([_NAMESPACE[2:], *namespace]) + extra_key[end:], tuple((f, d) for f, d in stretches)


def _seen(plan: Sequence[Sequence[Any]]) -> list[tuple[int, int]]:
    """Where what tokens see changes, and the digest of what they see from there."""
    starts: dict[int, list[str]] = {0: []}
    ends: dict[int, list[str]] = {}
    for a in from_carried(plan):
        if a.first < a.end:
            starts.setdefault(max(a.first, 0), []).append(a.ref)
            ends.setdefault(a.end, []).append(a.ref)
    seen: list[str] = []
    stretches = []
    for position in sorted({*starts, *ends} - {FOREVER}):
        for ref in ends.get(position, ()):
            seen.remove(ref)
        seen += starts.get(position, ())
        stretches.append((position, _digest(sorted(seen)) if seen else 0))
    return stretches


def _digest(references: list[str]) -> int:
    digest = hashlib.blake2b(json.dumps(references).encode(), digest_size=8, key=_SECRET).digest()
    return int.from_bytes(digest, "big") >> 1
