"""Cutting an answer where the client wants it to end.

Model servers take only so many stop sequences, and some leave the one they stopped
at, or the raw end-of-text token, at the end of the answer. What might be the start
of either is held back until more text decides.
"""

from collections.abc import Sequence
from functools import lru_cache

# What well-known models end with. Only at the very end of an answer is it taken off:
# "</s>" in the middle may well be HTML.
END_OF_TEXT = (
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<eos>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
    "<file_sep>",
    "<|file_sep|>",
    "<EOT>",
)


@lru_cache  # they are the configuration's, so there are few of them
def _looks(ends: tuple[str, ...]) -> tuple[frozenset[str], int]:
    """Return the first characters of all, and the length of the longest."""
    return frozenset(end[0] for end in ends), max(map(len, ends), default=0)


class Cutter:
    """Passes text on up to the first of ``stops``, and without a trailing ``ends``.

    ``is_cut`` is set at the first stop sequence; from then on nothing comes out.
    """

    is_cut = False
    _held = ""

    def __init__(self, stops: Sequence[str], ends: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._ends = tuple(ends)
        self._first_chars, self._longest = _looks(self._ends)
        if self._stops:
            self._first_chars |= {stop[0] for stop in self._stops}
            self._longest = max(self._longest, *map(len, self._stops))

    def feed(self, text: str) -> str:
        """Return what of the text so far is sure to belong to the answer."""
        if self.is_cut:
            return ""
        if not self._held and not self._may_begin(text):
            return text
        text = self._held + text
        if (cut := self._first_stop(text)) is not None:
            self.is_cut = True
            self._held = ""
            return text[:cut]
        keep = self._held_length(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def passes(self, text: str) -> bool:
        """Whether all of the text belongs to the answer, and can be told without
        ``feed``: nothing is held back that it would be part of.
        """
        return not (self.is_cut or self._held or self._may_begin(text))

    def _may_begin(self, text: str) -> bool:
        """Whether any of the text's characters is the first of what is looked for."""
        chars = self._first_chars
        if len(text) < len(chars):
            return not chars.isdisjoint(text)
        # To look for one character is so fast that it pays to do it for each of few.
        return any(map(text.__contains__, chars))

    def end(self) -> str:
        """Return the rest: what was held back and is no end marker."""
        if not self._held:
            return ""
        rest, self._held = self._held, ""
        for end in self._ends:
            if rest.endswith(end):
                return rest[: -len(end)]
        return rest

    def _first_stop(self, text: str) -> int | None:
        # The one that is complete first: so the answer is the same however the text
        # was cut into pieces, and the same as that of a server that stops there.
        found = [
            (at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0
        ]
        return min(found)[1] if found else None

    def _held_length(self, text: str) -> int:
        """How much of the end may be a stop that is not complete, or an end marker."""
        forms = (*self._stops, *self._ends)
        for at in range(max(0, len(text) - self._longest), len(text)):
            if text[at] in self._first_chars:
                tail = text[at:]
                if any(form.startswith(tail) for form in forms):
                    return len(tail)
        return 0
