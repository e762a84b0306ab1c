"""Runs of events that only go on with the text, told by their looks.

Nearly all events of a stream are the same but for a few letters of text. Once one of
them was parsed, the next ones need no parser: what stands around the text is compared
as bytes, many events at a time. Whatever looks different goes the long way.
"""

import msgspec

from proxy.sse import Event

_decode_texts = msgspec.json.Decoder(list[str]).decode
# A stream whose events are never alike (counters, time stamps) is not looked at for long.
_MOST_LESSONS = 16
_END = b"\n\n"


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
        "_lessons",
        "_line_head",
        "_lines",
        "is_learning",
    )

    def __init__(self) -> None:
        self.is_learning = True
        self._lessons = 0
        self._before = b""
        self._after = b""
        self._between = b""
        self._lines = 0  # of an event, the blank one included
        self._line_head = 0  # where the line with the text begins

    def learn(self, event: Event, text: str, data: bytes) -> None:
        """Remember how an event looks that said nothing but ``text``.

        Args: data: the read that the event came in.
        """
        self._lessons += 1
        self.is_learning = self._lessons < _MOST_LESSONS
        literal = f'"{text}"'
        # What stands in JSON as it is, so that it is found in there.
        is_plain = text.isascii() and text.isprintable() and "\\" not in text
        if not is_plain or '"' in text or event.data.count(literal) != 1:
            return
        head, tail = event.data.encode().split(literal.encode())
        name = b"" if event.type == "message" else f"event: {event.type}\n".encode()
        for lead in (b"data: ", b"data:"):
            before = b'%b%b%b"' % (name, lead, head)
            if before in data:
                self._before, self._after = before, b'"%b%b' % (tail, _END)
                self._between = self._after + before
                self._lines = self._between.count(b"\n")
                self._line_head = before.rfind(b"\n") + 1
                self.is_learning = False
                return

    def split(self, data: bytes) -> tuple[int, list[bytes]]:
        """Return the length of the run that ``data`` begins with, which ends with an
        event, and its texts as they stand between their quotes.

        ``data`` must begin where an event does.
        """
        before, after = self._before, self._after
        if before and data.startswith(before) and data.endswith(after):
            text = data[len(before) : -len(after)]
            if _is_plain(text):  # the usual case: one event
                self._lessons = 0
                return len(data), [text]
        end = data.rfind(after)
        if not before or end < 0 or not data.startswith(before):
            self.is_learning = self._lessons < _MOST_LESSONS
            return 0, []
        head, tail = len(before), len(_END) - len(after)
        end -= tail
        # By lines, since one byte is found much faster than two.
        count, start = self._lines, head - self._line_head
        lines = data[:end].split(b"\n")[count - 2 :: count]
        texts = [line[start:tail] for line in lines]
        # Put together again it is what it was, if all of them are of this kind.
        whole = self._between.join(texts)
        if (
            len(whole) != end + tail - head
            or not data.startswith(whole, head)
            or not _are_plain(texts)
        ):
            texts = self._first_plain(data[:end].split(_END))
            around = head - tail + len(_END)
            end = sum(map(len, texts)) + around * len(texts) - len(_END)
        self._lessons = 0
        return end + len(_END), texts

    def _first_plain(self, events: list[bytes]) -> list[bytes]:
        """Return the texts up to the first event that is another one."""
        before, after = self._before, self._after
        plain = []
        for event in events:
            text = event[len(before) : len(_END) - len(after)]
            whole = b"%b%b%b" % (before, text, after)
            if whole != event + _END or not _is_plain(text):
                break
            plain.append(text)
        return plain


def decode_texts(texts: list[bytes]) -> list[str] | None:
    """None if they are not what may stand in JSON strings."""
    try:
        return _decode_texts(b'["%b"]' % b'","'.join(texts))
    except (msgspec.DecodeError, UnicodeError):
        return None


def _is_plain(text: bytes) -> bool:
    """Whether a text ends its string neither before its end nor after it."""
    return (
        b'"' not in text
        and b"\n" not in text
        and b"\r" not in text
        and not text.endswith(b"\\")
    )


def _are_plain(texts: list[bytes]) -> bool:
    joined = b'"'.join(texts)
    return (
        joined.count(b'"') == len(texts) - 1
        and b'\\"' not in joined
        and _is_plain(joined.replace(b'"', b""))
    )
