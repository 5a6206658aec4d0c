"""What the front end resolved, on its way to the workers: one string among a request's ``custom_params``.

SGLang's messages allow scalars, and lists or tables of scalars, there; deeper ones end the process that reads them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from mem_triton.systems.request import CARRIER


def packed(words: Mapping[str, Any] | None, carried: Mapping[str, Any]) -> dict[str, Any] | None:
    """A request's ``custom_params`` for the workers: without memory's words, which have been answered."""
    others = {name: value for name, value in (words or {}).items() if not is_word(name)}
    if not carried:
        return others or None
    if state := carried.get("state"):
        carried = {**carried, "state": base64.b64encode(state).decode()}
    return {**others, CARRIER: json.dumps(carried)}


def has_carried(params: Any) -> bool:
    """Whether the front end put anything there."""
    return CARRIER in (getattr(params, "custom_params", None) or {})


def carried_of(params: Any) -> dict[str, Any] | None:
    """What the front end put into a request's sampling parameters, None if nothing."""
    text = (getattr(params, "custom_params", None) or {}).get(CARRIER)
    if text is None:
        return None
    carried = json.loads(text)
    if state := carried.get("state"):
        carried["state"] = base64.b64decode(state)
    return carried


def is_word(name: Any) -> bool:
    """Whether a key of ``custom_params`` is memory's."""
    return isinstance(name, str) and name.startswith("mem_")
