"""One grammar of the names of entries, tenants and sessions, for banks, the command line and requests alike.

A reference is an id with a version, ``contract@2``. ``contract#0``, ``contract#2-5`` and ``contract#*`` name references
that a document was cut into, in the document's order (``store.documents``).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Any

ID_RULE = "1 to 128 letters, digits, '.', '_', ':', '/' or '-', starting with a letter or digit (no '@' and no '#')"
NAME_RULE = "1 to 128 letters, digits, '.', '_' or '-', starting with a letter or digit"
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Of tenants and sessions, which are file names, too."""
OLD_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
"""What banks took before there was one grammar: still read, never written."""
VERSION = re.compile(r"[1-9][0-9]{0,8}")
_PLACES = re.compile(r"\*|(0|[1-9][0-9]{0,8})(?:-([0-9]{1,9}))?")
ENCODED = "xn--"
"""Start of a part of an id that is punycode, the encoding of international domain names: file names of any script
become ids, no two the same one, and ``.encode().decode("punycode")`` of the rest gives the name back."""


def is_id(value: Any) -> bool:
    """Whether an entry may have this id."""
    return isinstance(value, str) and ID.fullmatch(value) is not None


def is_name(value: Any) -> bool:
    """Whether a tenant or a session may be called so."""
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def split_reference(value: Any) -> tuple[str, int | None] | None:
    """("alice", 3) of "alice@3", ("alice", None) of "alice", None for what is neither."""
    if not isinstance(value, str):
        return None
    id, at, version = value.partition("@")
    if not is_id(id) or (at and not VERSION.fullmatch(version)):
        return None
    return id, int(version) if at else None


def split_places(value: Any) -> tuple[str, int, int | None] | None:
    """(document, first, end) of "document#0", "document#2-5" and "document#*" (end None); None for anything else."""
    if not isinstance(value, str):
        return None
    name, hash, places = value.partition("#")
    match = _PLACES.fullmatch(places)
    if not hash or not is_id(name) or match is None:
        return None
    if places == "*":
        return name, 0, None
    first, last = int(match[1]), int(match[2] or match[1])
    return (name, first, last + 1) if last >= first else None


def composed(text: str) -> str:
    """Unicode's NFC: "é" is one name however a keyboard or a file system writes it."""
    return unicodedata.normalize("NFC", text)


def id_from(text: str, longest: int = 128) -> str:
    """An id that says what a file or a record is called; "" if nothing is left.

    What an id may not have becomes "-"; parts between "/" with letters of other scripts are written in punycode.
    """
    parts = [_ascii(part) for part in composed(text).split("/")]
    return shortened("/".join(part for part in parts if part), longest)


def _ascii(part: str) -> str:
    part = re.sub(r"[^A-Za-z0-9._:\x80-\U0010ffff-]+", "-", part).strip("-._:")
    return part if part.isascii() else ENCODED + part.encode("punycode").decode()


def shortened(text: str, longest: int) -> str:
    """A name of at most so many characters: a longer one ends in a hash of the whole."""
    if len(text) <= longest:
        return text
    return f"{text[: longest - 13]}-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:12]}"
