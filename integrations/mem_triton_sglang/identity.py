"""What a request's KV depends on besides its tokens, packed into SGLang's ``extra_key``: the front end writes it, the
radix cache of each scheduler reads it (``radix_keys``).

SGLang appends to an extra key (a LoRA adapter's id), so what follows ours stays part of the namespace.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from functools import lru_cache

from mem_triton.store.pool.plan import FOREVER
from mem_triton.systems.payload import RequestPayload

_OURS = '["mem_triton'
MARK = f'{_OURS}", '
"""How a key begins that says what its tokens see."""
_NAMESPACE = f"{_OURS} namespace"
_SECRET = os.urandom(16)  # of this front end: nobody outside can search for references whose digests collide


def extra_key_of(client_key: str | None, key: str | None = None, payload: RequestPayload | None = None) -> str | None:
    """The key of one request. key: what all its tokens depend on; payload: what parts of them depend on.

    Call it for every request: without memory it is the client's own key, quoted if it imitates one of ours.
    """
    parts = sorted(payload.systems.items()) if payload is not None else []
    keys = [[name, part.key] for name, part in parts if part.key]
    segments = [(f"{name}:{s.ref}", s.first, s.end) for name, part in parts for s in part.segments]
    if key is None and not keys and not segments and not (client_key or "").startswith(_OURS):
        return client_key
    return json.dumps(["mem_triton", client_key, key, keys, _seen(segments)])


@lru_cache(maxsize=1024)
def parse(extra_key: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The namespace of a key with ``MARK``, and (first_token, digest) of each stretch of tokens that sees the same
    references, ascending; digests have 63 bits, 0 is none. Raises ValueError for what ``extra_key_of`` never made."""
    (_, *namespace, stretches), end = json.JSONDecoder().raw_decode(extra_key)
    return json.dumps([_NAMESPACE[2:], *namespace]) + extra_key[end:], tuple((f, d) for f, d in stretches)


def _seen(segments: Iterable[tuple[str, int, int]]) -> list[tuple[int, int]]:
    """Where what tokens see changes, and the digest of what they see from there. segments: (what, first, end)."""
    starts: dict[int, list[str]] = {0: []}
    ends: dict[int, list[str]] = {}
    for what, first, end in segments:
        if first < end:
            starts.setdefault(max(first, 0), []).append(what)
            ends.setdefault(end, []).append(what)
    seen: list[str] = []
    stretches = []
    for position in sorted({*starts, *ends} - {FOREVER}):
        for what in ends.get(position, ()):
            seen.remove(what)
        seen += starts.get(position, ())
        stretches.append((position, _digest(sorted(seen)) if seen else 0))
    return stretches


def _digest(references: list[str]) -> int:
    digest = hashlib.blake2b(json.dumps(references).encode(), digest_size=8, key=_SECRET).digest()
    return int.from_bytes(digest, "big") >> 1
