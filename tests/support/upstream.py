"""An upstream that says exactly the bytes it was told to, when it was told to.

    async with ScriptedUpstream() as upstream:
        upstream.script(sse(*openai_chunks(["Hel", "lo"])))
        ...                                   # point the proxy at upstream.url
        assert upstream.requests[0].json()["stream"] is True

A script is a list of steps: bytes, ``Pause``, ``Wait``, ``Hang``, ``Reset``, ``Close``.
Each request takes the next script; the last one repeats.
"""

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self, TypeAlias

Pairs: TypeAlias = list[tuple[str, str]]
HeadersLike: TypeAlias = Mapping[str, str] | Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Pause:
    """Say nothing for a while."""

    seconds: float


@dataclass(frozen=True)
class Wait:
    """Say nothing until the test sets the event."""

    event: asyncio.Event


@dataclass(frozen=True)
class Hang:
    """Say nothing until the peer gives up or the server is stopped."""


@dataclass(frozen=True)
class Reset:
    """End the connection with RST; what was written before is still delivered."""


@dataclass(frozen=True)
class Close:
    """End the connection with FIN."""


Step: TypeAlias = bytes | Pause | Wait | Hang | Reset | Close
Script: TypeAlias = list[Step]


def find_header(headers: Pairs, name: str) -> str | None:
    wanted = name.lower()
    return next((value for key, value in headers if key.lower() == wanted), None)


@dataclass
class Recorded:
    """One request as it arrived, and what became of its connection.

    ``path`` includes the query. ``replied`` turns true when the whole script has been
    played, ``peer_closed`` when the peer ended the connection, before that or after.
    """

    method: str
    path: str
    version: str
    headers: Pairs
    body: bytes
    chunked: bool
    at: float = field(default_factory=time.monotonic)
    replied: bool = False
    peer_closed: bool = False

    def header(self, name: str) -> str | None:
        return find_header(self.headers, name)

    def json(self) -> Any:
        return json.loads(self.body)


class Malformed(Exception):
    """The peer sent something that is no HTTP/1.1 request."""


async def read_request(reader: asyncio.StreamReader) -> Recorded | None:
    """Read one request; ``None`` if the peer closed instead of sending one."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as cut:
        if cut.partial:
            raise Malformed(f"head cut after {cut.partial!r}") from None
        return None
    lines = head.decode("latin-1").split("\r\n")[:-2]
    try:
        method, path, version = lines[0].split(" ")
    except ValueError:
        raise Malformed(f"request line {lines[0]!r}") from None
    headers = [_header_pair(line) for line in lines[1:]]
    body, chunked = await _read_body(reader, headers)
    return Recorded(method, path, version, headers, body, chunked)


def _header_pair(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    if not colon or name != name.strip():
        raise Malformed(f"header line {line!r}")
    return name, value.strip(" \t")


async def _read_body(
    reader: asyncio.StreamReader, headers: Pairs
) -> tuple[bytes, bool]:
    if (find_header(headers, "transfer-encoding") or "").lower() == "chunked":
        if find_header(headers, "content-length") is not None:
            raise Malformed("both Content-Length and Transfer-Encoding")
        return await _read_chunks(reader), True
    length = find_header(headers, "content-length") or "0"
    if not length.isdecimal():
        raise Malformed(f"Content-Length {length!r}")
    return await reader.readexactly(int(length)), False


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        if await reader.readexactly(2) != b"\r\n":
            raise Malformed("chunk without its line end")
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass  # a trailer
    return bytes(body)


class ScriptedUpstream:
    """A raw server on 127.0.0.1 that records requests and plays scripts.

    Attributes:
        requests: what arrived, in order.
        malformed: what arrived and was no HTTP; leaving the context then fails.
        opened: number of connections ever accepted; ``open`` counts those still up.
        sent_bytes: how much the peer's socket has taken so far.
    """

    def __init__(self) -> None:
        self.requests: list[Recorded] = []
        self.malformed: list[str] = []
        self.opened = 0
        self.sent_bytes = 0
        self.port = 0
        self._scripts: dict[str | None, deque[Script]] = defaultdict(deque)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def open(self) -> int:
        return len(self._connections)

    @property
    def last(self) -> Recorded:
        return self.requests[-1]

    def script(self, *steps: Step | Sequence[Step], path: str | None = None) -> Self:
        """Queue one script; with ``path`` only for requests to it (query aside)."""
        self._scripts[path].append(_flatten(steps))
        return self

    async def received(self, count: int = 1, within_s: float = 2.0) -> Recorded:
        """Wait for the ``count``-th request since the start."""
        await self._until(
            lambda: len(self.requests) >= count, f"request {count}", within_s
        )
        return self.requests[count - 1]

    async def closed(self, index: int = -1, within_s: float = 2.0) -> Recorded:
        """Wait until the peer has closed the connection of a request."""
        await self._until(
            lambda: bool(self.requests) and self.requests[index].peer_closed,
            f"the peer to close the connection of request {index}",
            within_s,
        )
        return self.requests[index]

    async def idle(self, within_s: float = 2.0) -> None:
        """Wait until no connection is open."""
        await self._until(lambda: not self.open, "all connections to close", within_s)

    async def start(self, port: int = 0) -> Self:
        self._server = await asyncio.start_server(
            self._accept, "127.0.0.1", port, limit=2**20
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """Close the port and every connection; ``start`` may follow."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()
        if error is None:
            assert not self.malformed, self.malformed

    async def _until(
        self, reached: Callable[[], bool], what: str, within_s: float
    ) -> None:
        try:
            async with asyncio.timeout(within_s):
                while not reached():
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"waited {within_s} s for {what}") from None

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        # Not a coroutine: the streams module would own the task and log its
        # cancellation in its own way on some versions.
        self.opened += 1
        task = asyncio.get_running_loop().create_task(self._run(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._forget)
        self._notify()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._connections.discard(task)
        self._notify()
        if not task.cancelled() and (error := task.exception()) is not None:
            self.malformed.append(repr(error))

    async def _run(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        connection = _Connection(self, writer)
        serving = asyncio.create_task(connection.serve())
        try:
            # A script may hang for ever, so the end of the connection is noticed
            # here, by a read that never stops.
            await _pump(reader, connection.received)
            connection.note_end()
            self._notify()
            if not connection.reading:
                serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
        finally:
            # First what needs no waiting: a second cancellation may end the rest.
            serving.cancel()
            writer.transport.abort()
            await asyncio.gather(serving, return_exceptions=True)
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _next_script(self, path: str) -> Script:
        queue = self._scripts.get(path.partition("?")[0]) or self._scripts.get(None)
        if not queue:
            return [reply(500, body=f"no script for {path}")]
        return queue.popleft() if len(queue) > 1 else queue[0]


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(2**16):
            target.feed_data(data)


class _Connection:
    """One accepted connection: requests in, scripts out, until either side ends it."""

    def __init__(self, owner: ScriptedUpstream, writer: asyncio.StreamWriter) -> None:
        self.received = asyncio.StreamReader(limit=2**20)
        self.reading = True
        self._owner = owner
        self._writer = writer
        self._requests: list[Recorded] = []
        self._closed_here = False
        self._closed_by_peer = False

    def note_end(self) -> None:
        """The socket gives no more bytes."""
        self._closed_by_peer = not self._closed_here
        for request in self._requests:
            request.peer_closed = self._closed_by_peer
        self.received.feed_eof()

    async def serve(self) -> None:
        try:
            while await self._serve_one():
                pass
            self._close()
        except (Malformed, ValueError, asyncio.LimitOverrunError) as error:
            self._owner.malformed.append(str(error))
            self._close()
        except (asyncio.IncompleteReadError, OSError):
            pass  # the peer is gone, which note_end records

    async def _serve_one(self) -> bool:
        self.reading = True
        request = await read_request(self.received)
        self.reading = False
        if request is None:
            return False
        request.peer_closed = self._closed_by_peer
        self._requests.append(request)
        self._owner.requests.append(request)
        self._owner._notify()
        if self._closed_by_peer:
            return False
        return await self._answer(request)

    async def _answer(self, request: Recorded) -> bool:
        for step in self._owner._next_script(request.path):
            await self._play(step)
            if self._closed_here:
                break
        request.replied = True
        self._owner._notify()
        return not self._closed_here and request.header("connection") != "close"

    async def _play(self, step: Step) -> None:
        match step:
            case bytes():
                await self._write(step)
            case Pause(seconds):
                await asyncio.sleep(seconds)
            case Wait(event):
                await event.wait()
            case Hang():
                await asyncio.Event().wait()
            case Reset():
                self._reset()
            case Close():
                self._close()

    async def _write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()
        self._owner.sent_bytes += len(data)
        # A reader in this event loop gets its turn, so that two writes are two reads.
        for _ in range(3):
            await asyncio.sleep(0)

    def _close(self) -> None:
        self._closed_here = True
        self._writer.close()

    def _reset(self) -> None:
        self._closed_here = True
        raw = self._writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


def _flatten(steps: Iterable[Step | Sequence[Step]]) -> Script:
    script: Script = []
    for step in steps:
        if isinstance(step, (bytes, Pause, Wait, Hang, Reset, Close)):
            script.append(step)
        else:
            script.extend(step)
    return script


# --- replies -------------------------------------------------------------------------

_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def pairs_of(headers: HeadersLike) -> Pairs:
    return list(headers.items() if isinstance(headers, Mapping) else headers)


def head(status: int, headers: HeadersLike = (), reason: str | None = None) -> bytes:
    """A status line and headers, exactly those given."""
    phrase = _PHRASES.get(status, "Unknown") if reason is None else reason
    lines = [f"HTTP/1.1 {status} {phrase}"]
    lines += [f"{name}: {value}" for name, value in pairs_of(headers)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def reply(
    status: int = 200,
    headers: HeadersLike = (),
    body: bytes | str = b"",
    reason: str | None = None,
) -> bytes:
    """A whole reply; Content-Length is added unless the framing is given."""
    content = body.encode() if isinstance(body, str) else body
    pairs = pairs_of(headers)
    framing = {"content-length", "transfer-encoding"}
    if not framing & {name.lower() for name, _ in pairs}:
        pairs.append(("Content-Length", str(len(content))))
    return head(status, pairs, reason) + content


def json_reply(value: object, status: int = 200, headers: HeadersLike = ()) -> bytes:
    pairs = pairs_of(headers)
    return reply(status, [("Content-Type", "application/json"), *pairs], encode(value))


def sse_head(headers: HeadersLike = (), *, chunked: bool = True) -> bytes:
    """The head of an event stream; ``headers`` come after the usual ones and replace
    those of the same name."""
    given = pairs_of(headers)
    names = {name.lower() for name, _ in given}
    usual = [("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache")]
    if chunked:
        usual.append(("Transfer-Encoding", "chunked"))
    return head(200, [pair for pair in usual if pair[0].lower() not in names] + given)


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def last_chunk() -> bytes:
    return b"0\r\n\r\n"


def sse(*parts: Step, headers: HeadersLike = (), chunked: bool = True) -> Script:
    """An event stream: the head, each ``bytes`` as its own chunk and write, the end.

    Other steps stand where they are given: ``sse(a, Pause(0.1), b, Reset())``. Without
    ``chunked`` the end of the body is the end of the connection.
    """
    frame = chunk if chunked else bytes
    body = [frame(part) if isinstance(part, bytes) else part for part in parts]
    end: Step = last_chunk() if chunked else Close()
    return [sse_head(headers, chunked=chunked), *body, end]


# --- events of several dialects ------------------------------------------------------


def encode(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def data(value: object) -> bytes:
    """One event without a name."""
    return b"data: %b\n\n" % encode(value)


def event(name: str, value: object) -> bytes:
    """One event with a name."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), encode(value))


DONE = b"data: [DONE]\n\n"
CREATED = 1_700_000_000


def usage_of(counts: tuple[int, int]) -> dict[str, int]:
    prompt, completion = counts
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def openai_chunk(
    delta: Mapping[str, object] | None,
    finish: str | None = None,
    **extra: object,
) -> bytes:
    """One chat chunk; ``delta`` None means no choices at all."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return data(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": CREATED,
            "model": "gpt-test",
            "choices": [] if delta is None else [choice],
            **extra,
        }
    )


def openai_chunks(
    texts: Iterable[str],
    finish: str | None = "stop",
    usage: tuple[int, int] | None = None,
) -> list[bytes]:
    """A chat stream: a role, the texts, the finish, perhaps usage, ``[DONE]``.

    ``finish`` None leaves out the finish and ``[DONE]``: a stream that was cut.
    """
    chunks = [openai_chunk({"role": "assistant", "content": ""})]
    chunks += [openai_chunk({"content": text}) for text in texts]
    if finish is None:
        return chunks
    chunks.append(openai_chunk({}, finish))
    if usage is not None:
        chunks.append(openai_chunk(None, usage=usage_of(usage)))
    return [*chunks, DONE]


def _tgi(kind: str, choices: list[object], **extra: object) -> bytes:
    return data(
        {
            "object": kind,
            "id": "",
            "created": CREATED,
            "model": "tgi-test",
            "system_fingerprint": "3.0.0-native",
            "choices": choices,
            **extra,
        }
    )


def _tgi_completion_chunk(text: str, finish: str = "", **extra: object) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return _tgi("text_completion", [choice], **extra)


def tgi_completion_chunks(
    texts: Sequence[str],
    finish: str | None = "eos_token",
    usage: tuple[int, int] = (5, 3),
) -> list[bytes]:
    """TGI's ``/v1/completions``: finish "" until the last text, which has usage too.

    The last text is sent as given: end it with ``</s>`` or a stop text, as TGI does.
    ``finish`` None: a stream that was cut.
    """
    if finish is None:
        return [_tgi_completion_chunk(text) for text in texts]
    chunks = [_tgi_completion_chunk(text) for text in texts[:-1]]
    last = _tgi_completion_chunk(texts[-1], finish, usage=usage_of(usage))
    return [*chunks, last, DONE]


def tgi_chat_chunks(
    texts: Sequence[str],
    finish: str | None = "stop",
    usage: tuple[int, int] | None = None,
) -> list[bytes]:
    """TGI's chat: the role in every delta, the finish in the chunk of the last text."""
    chunks = []
    for index, text in enumerate(texts):
        last = finish is not None and index == len(texts) - 1
        choice = {
            "index": 0,
            "delta": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": finish if last else None,
        }
        chunks.append(_tgi("chat.completion.chunk", [choice], usage=None))
    if finish is None:
        return chunks
    if usage is not None:
        chunks.append(_tgi("chat.completion.chunk", [], usage=usage_of(usage)))
    return [*chunks, DONE]


def tgi_generate_events(
    texts: Sequence[str], finish: str | None = "eos_token"
) -> list[bytes]:
    """TGI's ``/generate_stream`` with details: no ``[DONE]``, the text again at last."""
    events = []
    for index, text in enumerate(texts, 1):
        last = finish is not None and index == len(texts)
        token = {"id": 100 + index, "text": text, "logprob": -0.5, "special": False}
        details = {
            "finish_reason": finish,
            "generated_tokens": len(texts),
            "seed": None,
            "input_length": 5,
        }
        events.append(
            data(
                {
                    "index": index,
                    "token": token,
                    "generated_text": "".join(texts) if last else None,
                    "details": details if last else None,
                }
            )
        )
    return events


def anthropic_events(
    texts: Iterable[str],
    stop_reason: str | None = "end_turn",
    usage: tuple[int, int] = (10, 5),
) -> list[bytes]:
    """A messages stream with one text block; ``stop_reason`` None cuts it."""
    prompt, completion = usage
    message: dict[str, object] = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": "claude-test",
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": prompt, "output_tokens": 1},
    }
    block = {"type": "text", "text": ""}
    events = [
        _anthropic("message_start", message=message),
        _anthropic("content_block_start", index=0, content_block=block),
        _anthropic("ping"),
    ]
    for text in texts:
        delta = {"type": "text_delta", "text": text}
        events.append(_anthropic("content_block_delta", index=0, delta=delta))
    if stop_reason is None:
        return events
    end = {"stop_reason": stop_reason, "stop_sequence": None}
    return [
        *events,
        _anthropic("content_block_stop", index=0),
        _anthropic("message_delta", delta=end, usage={"output_tokens": completion}),
        _anthropic("message_stop"),
    ]


def _anthropic(kind: str, **rest: object) -> bytes:
    return event(kind, {"type": kind, **rest})
