"""Runs of events that only go on with the text, told by their looks.

Nearly all events of a stream are the same but for a few letters of text. Once one of
them was parsed, the next ones need no parser: what stands around the text is compared
as bytes, many events at a time. Whatever looks different goes the long way.
"""

import re
from operator import itemgetter

import msgspec

from proxy.sse import Event

_decode_texts = msgspec.json.Decoder(list[str]).decode
# A stream whose events are never alike (counters, time stamps) is not looked at for long.
_MOST_LESSONS = 16
_END = b"\n\n"
# What finds the events of a run: of two newlines alone, or of many bytes, the search takes
# twice as long (CPython 3.11: 16 and 15 against 6 µs for 64 events of 235 bytes).
_SEAM_BYTES = 13
# An event that has not ended yet is looked at again with every read: so not a long one.
_MOST_WAITING = 4096
# The text of one event, mostly.
_SHORT_BYTES = 32

# Where kinds of events take turns (several answers at once), to look for the next run
# after every event costs more than to parse them all.
_SHORT_RUN = 4

_BACKSLASH = ord("\\")
# The characters that stand for themselves in JSON, whoever writes it.
_LITERAL = bytes(set(range(ord(" "), ord("~") + 1)) - {ord('"'), _BACKSLASH})
# Texts, one a line, in which nothing but these is escaped, ...
_SHORT_ESCAPES = re.compile(rb'[^\\]*(?:\\["\\bfnrt][^\\]*)*').fullmatch
# ... and each of which stays within its quotes.
_STRINGS = re.compile(rb'[^"\\\r]*(?:\\[^\n\r][^"\\\r]*)*').fullmatch


class Runs:
    """Learns from one stream what its events look like around their text.

    An event is taken for another one of the same kind only if all of its bytes outside
    of one JSON string are the same, and nothing ends that string early: then a parser
    would find the same in it, with another text.
    """

    __slots__ = (
        "_after",
        "_before",
        "_between",
        "_is_mixed",
        "_lessons",
        "_seam",
        "_text_of",
        "is_learning",
        "is_plain",
    )

    def __init__(self) -> None:
        self.is_learning = True
        # The last run was one text, which is not empty and needs no escaping.
        self.is_plain = False
        self._lessons = 0
        self._before = b""
        self._after = b""
        self._is_mixed = False

    def learn(self, event: Event, text: str, data: bytes) -> None:
        """Remember how an event looks that said nothing but ``text``.

        Args: data: the read that the event came in.
        """
        self._lessons += 1
        self.is_learning = self._lessons < _MOST_LESSONS
        # What stands in JSON as it is, so that it is found in there.
        if not (text.isascii() and text.isprintable()) or '"' in text or "\\" in text:
            return
        literal = f'"{text}"'
        head, found, tail = event.data.partition(literal)
        if not found or literal in tail:
            return
        before = f'data: {head}"'.encode()
        if event.type != "message":
            before = b"event: %b\n%b" % (event.type.encode(), before)
        if before not in data:
            before = before.replace(b"data: ", b"data:", 1)
            if before not in data:
                return
        self.is_learning = False
        after = f'"{tail}\n\n'.encode()
        self._before, self._after = before, after
        self._between = after + before
        self._seam = _END + before[:_SEAM_BYTES]
        # Of what is between two seams.
        cut = slice(len(before) - len(self._seam) + len(_END), len(_END) - len(after))
        self._text_of = itemgetter(cut)

    @property
    def is_known(self) -> bool:
        return bool(self._before)

    def split(self, data: bytes, start: int = 0) -> tuple[int, list[bytes]]:
        """Return where the run ends that begins at ``start``, 0 if there is none, and
        its texts as they stand between their quotes.

        An event must begin at ``start``; a run ends where an event does.
        """
        before, after = self._before, self._after
        head, end = start + len(before), len(data) - len(after)
        self.is_plain = False
        if not before or data[start:head] != before:
            self.is_learning = self._lessons < _MOST_LESSONS
            return 0, []
        # One event, as long as nobody is late.
        if end >= head and data[end:] == after:
            text = data[head:end]
            # A table, as ``translate`` makes first, takes as long as 30 bytes do here.
            is_short = len(text) < _SHORT_BYTES
            is_plain = not (
                text.lstrip(_LITERAL) if is_short else text.translate(None, _LITERAL)
            )
            if is_plain or _are_strings([text]):
                self._lessons = 0
                self.is_plain = is_plain and bool(text)
                return len(data), [text]
        end = data.rfind(after, head)
        if end < 0:
            self.is_learning = self._lessons < _MOST_LESSONS
            return 0, []
        seam = self._seam
        first, last = start + len(seam) - len(_END), end + len(after) - len(_END)
        texts = list(map(self._text_of, data[first:last].split(seam)))
        # Put together again it is what it was, if all of them are of this kind.
        whole = self._between.join(texts)
        self._lessons = 0
        if (
            len(whole) == end - head
            and data.startswith(whole, head)
            and _are_strings(texts)
        ):
            self._is_mixed = False
            return end + len(after), texts
        texts = self._first_strings(data[start:last].split(_END))
        self._is_mixed = len(texts) < _SHORT_RUN
        size = sum(map(len, texts)) + len(self._between) * len(texts)
        return start + size if texts else 0, texts

    def _first_strings(self, events: list[bytes]) -> list[bytes]:
        """Return the texts up to the first event that is another one."""
        before, after = self._before, self._after
        texts: list[bytes] = []
        for event in events:
            text = event[len(before) : len(_END) - len(after)]
            whole = b"%b%b%b" % (before, text, after)
            if whole != event + _END or not _are_strings([text]):
                break
            texts.append(text)
        return texts

    def may_go_on(self, data: bytes, start: int = 0) -> bool:
        """Whether a run may follow the event at ``start``, which belongs to none."""
        is_likely = self.is_known and not self._is_mixed
        return is_likely and data.find(self._after, start) >= 0

    def can_wait(self, data: bytes) -> bool:
        """Whether ``data`` is the beginning of an event like the others, and nothing in
        it is for a parser to see before the rest comes.
        """
        before = self._before
        if len(data) <= len(before):
            return before.startswith(data)
        rest = data[len(before) :]
        return (
            self.is_known
            and len(data) <= _MOST_WAITING
            and data.startswith(before)
            and b"\r" not in rest
            and b"\n" not in rest[:-1]
        )


def decode_texts(texts: list[bytes]) -> list[str] | None:
    """None if they are not what may stand in JSON strings."""
    try:
        return _decode_texts(b'["%b"]' % b'","'.join(texts))
    except (msgspec.DecodeError, UnicodeError):
        return None


def are_literal(texts: list[bytes]) -> bool:
    """Whether each text is what Python's encoder would put between quotes, and none is
    empty. They must be as ``split`` returns them.
    """
    if not all(texts):
        return False
    odd = b"".join(texts).translate(None, _LITERAL)
    if not odd:
        return True
    is_escaped = not odd.strip(b'"\\')
    return is_escaped and _SHORT_ESCAPES(b"\n".join(texts)) is not None


def _are_strings(texts: list[bytes]) -> bool:
    """Whether no text ends its string early, and none its line."""
    odd = b"".join(texts).translate(None, _LITERAL)
    if not odd:
        return True
    if b"\n" in odd:
        return False
    return _STRINGS(b"\n".join(texts)) is not None
