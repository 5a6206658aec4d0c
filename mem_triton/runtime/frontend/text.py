"""Decodes the text of an answer that is cut into several engine requests, from all its tokens.

An engine decodes each request by itself: one that starts within a character loses it, or prints what was before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"
"""What a tokenizer writes for a character whose tokens are not all there yet."""
CONTEXT = 5
"""Tokens of the prompt that the text's first token is decoded behind: tokenizers drop a space at a text's start."""


class TextOfTokens:
    """Decodes tokens as they come; characters that are not complete wait. decode: token ids to text.

    Example::

        text = TextOfTokens(tokenizer.decode, prompt_ids)
        text.take([175])         # half a character
        text.so_far              # ""
        text.whole()             # "\ufffd": if the answer ends here
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        self._tokens = _whole_characters(decode, list(prompt_ids[-2 * CONTEXT :]))[-CONTEXT:]
        self._start, self._read = 0, len(self._tokens)  # what is decoded anew, and what of it has been told
        self.so_far = ""

    def take(self, tokens: Sequence[int]) -> None:
        """The next tokens."""
        self._tokens += tokens
        new = self._new()
        if new and not new.endswith(BROKEN):
            self.so_far += new
            self._start, self._read = self._read, len(self._tokens)

    def whole(self) -> str:
        """All text, with the characters that it ends within."""
        return self.so_far + self._new()

    def _new(self) -> str:
        told = self._decode(self._tokens[self._start : self._read])
        return self._decode(self._tokens[self._start :])[len(told) :]


def _whole_characters(decode: Callable[[list[int]], str], tokens: list[int]) -> list[int]:
    """Without tokens at the end that are part of a character: what comes after them would complete it."""
    while tokens and decode(tokens).endswith(BROKEN):
        tokens = tokens[:-1]
    return tokens
