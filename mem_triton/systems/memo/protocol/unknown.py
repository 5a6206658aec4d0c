"""Decides whether a memory model's reply is an answer, says that it does not know, or refuses.

The authors look for "i don't know" anywhere in the raw reply (their eval_msq_trng_structured_multi_step.py, line 23),
so that an answer whose reasoning holds the phrase is thrown away. Here the parsed field decides where there is one, and
otherwise the beginning of the whole answer.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from mem_triton.systems.memo.protocol.parsing import read_object, without_thought

Kind = Literal["answer", "unknown", "refused"]

_UNKNOWN = (
    # English
    "i don't know",
    "i do not know",
    "i dont know",
    "don't know",
    "i'm not sure",
    "i am not sure",
    "not known",
    "unknown",
    "i have no information",
    "i don't have any information",
    "i don't have that information",
    "no information",
    "i don't have information",
    "i do not have information",
    "it is not known",
    "n/a",
    "none",
    # German
    "ich weiß es nicht",
    "ich weiß das nicht",
    "ich weiß nicht",
    "ich weiss es nicht",
    "ich weiss nicht",
    "das weiß ich nicht",
    "weiß ich nicht",
    "unbekannt",
    "keine ahnung",
    "dazu habe ich keine informationen",
    # French
    "je ne sais pas",
    "je l'ignore",
    "je n'en sais rien",
    "inconnu",
    "je n'ai pas d'information",
    # Spanish
    "no lo sé",
    "no sé",
    "no lo se",
    "lo desconozco",
    "desconocido",
    "no tengo información",
    # Chinese
    "我不知道",
    "不知道",
    "我不清楚",
    "未知",
    "不清楚",
)
_REFUSED = (
    "i'm sorry, but i can't",
    "i'm sorry, i can't",
    "i can't help",
    "i cannot help",
    "i can't assist",
    "i cannot assist",
    "i'm unable to help",
    "as an ai",
    "es tut mir leid, aber ich kann",
    "dabei kann ich nicht helfen",
    "je suis désolé, mais je ne peux",
    "je ne peux pas vous aider",
    "lo siento, pero no puedo",
    "no puedo ayudar",
    "抱歉,我无法",
    "对不起,我不能",
)
_WHOLE = frozenset(
    {"unknown", "none", "n/a", "not known", "no information", "unbekannt", "inconnu", "desconocido", "未知"}
)
"""Phrases that say nothing is known only where nothing follows: "Unknown Pleasures" is an album."""
_BUT = re.compile(r"\b(?:but|however|though|aber|jedoch|mais|cependant|pero|sin embargo)\b|但是?|不过")
_APOSTROPHES = str.maketrans("’‘ʼ′´`＇", "'''''''")
_EDGES = " \t\r\n\"'“”„«»*_()[]"
_ENDS = ".!?…。！？;；,，:"


def normalised(text: str) -> str:
    """A text for comparison: compatibility forms, one apostrophe, no case, single blanks, nothing at its edges."""
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).casefold()
    return " ".join(text.split()).strip(_EDGES)


def kind_of(text: str) -> Kind:
    """What an answer's own text says. "I don't know." is unknown, with sentences behind it too; one that goes on with
    "but" is an answer."""
    said = normalised(text)
    if any(said.startswith(phrase) for phrase in _REFUSED_FOLDED):
        return "refused"
    if said.rstrip(_ENDS + _EDGES) in _WHOLE_FOLDED:
        return "unknown"
    for phrase in _BEGINNINGS:
        if said.startswith(phrase):
            rest = said[len(phrase) :]
            if (not rest or not rest[0].isalnum() or not phrase[-1].isascii()) and not _BUT.search(rest):
                return "unknown"
    return "answer"


def read_memory(text: str) -> tuple[Kind, str]:
    """(what a memory reply is, its answer). The field "answer" of a JSON object decides; else the whole text."""
    text = without_thought(text)
    if text.startswith(("{", "```")):
        value, _ = read_object(text)
        if value is not None and "answer" in value:
            answer = value["answer"]
            if isinstance(answer, (str, int, float)) and not isinstance(answer, bool) and (said := str(answer).strip()):
                return kind_of(said), said
            return "unknown", ""
    return kind_of(text), text


_WHOLE_FOLDED = frozenset(normalised(phrase) for phrase in _WHOLE)
_BEGINNINGS = tuple(sorted({normalised(phrase) for phrase in _UNKNOWN} - _WHOLE_FOLDED, key=len, reverse=True))
_REFUSED_FOLDED = tuple(normalised(phrase) for phrase in _REFUSED)
