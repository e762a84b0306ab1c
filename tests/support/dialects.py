"""What a client of each dialect sends, and what it makes of the bytes that come back.

``DIALECTS`` are the ways to ask; ``Dialect.read`` says of a raw reply which text it
has, which error, and whether it ends as that dialect's replies have to end.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support import cody
from tests.support.client import RawReply

MODEL = "large-1"
PROMPT = "Say hello"


@dataclass
class Seen:
    """A reply as its client understands it.

    ``error`` is the message it shows, None if the reply is a success. ``pings`` is how
    often it was told that the proxy is there.
    """

    text: str = ""
    error: str | None = None
    pings: int = 0


@dataclass(frozen=True)
class Dialect:
    """Attributes:

    path:     where it asks, the query included.
    asked:    its request, but for ``stream``.
    read_stream, read_whole: what it makes of a reply of status 200.
    wants_completions: it is asked of an OpenAI-like upstream at ``/v1/completions``.
    says_status: an error that comes before its first byte is a status, even if the
              request was for a stream.
    """

    name: str
    path: str
    asked: Mapping[str, Any]
    read_stream: Callable[[bytes], Seen]
    read_whole: Callable[[Any], str]
    headers: Mapping[str, str] = field(default_factory=dict)
    wants_completions: bool = False
    says_status: bool = True

    def body(self, *, stream: bool) -> dict[str, Any]:
        return {**self.asked, "stream": stream}

    def read(self, raw: RawReply, *, stream: bool) -> Seen:
        """Fails if the reply does not end, ends twice, or goes on after its end."""
        assert raw.complete, f"cut after {raw.body[-200:]!r}"
        if raw.status != 200:
            return Seen(error=_message(raw))
        if not stream:
            return Seen(self.read_whole(raw.json()))
        kind = raw.header("content-type")
        if not self.says_status:
            assert kind == "text/event-stream"
        return self.read_stream(raw.body)


def _message(raw: RawReply) -> str:
    """Return what a status of 400 or more is explained with."""
    assert raw.status >= 400, raw.status
    # Clients take these for a verdict on their own token.
    assert raw.status not in (401, 403), raw.status
    if not (raw.header("content-type") or "").startswith("application/json"):
        return raw.text.strip()
    error = raw.json()["error"]
    return error if isinstance(error, str) else str(error["message"])


def events(body: bytes) -> Iterator[tuple[str, str]]:
    """Yield (name, data) of each event, comments as (":", text); all must be whole."""
    assert body.endswith(b"\n\n"), body[-80:]
    for block in filter(None, body.decode().split("\n\n")):
        name, data = "", []
        for line in block.split("\n"):
            key, colon, value = line.partition(":")
            assert colon, f"no field: {line!r}"
            if not key:
                name = ":"
            elif key == "event":
                name = value.strip()
            elif key == "data":
                data.append(value.removeprefix(" "))
        assert name == ":" or data, f"an event without data: {block!r}"
        yield name, "\n".join(data)


# -------------------------------------------------------------------------------- Cody


def _cody(version: int) -> Callable[[bytes], Seen]:
    def read(body: bytes) -> Seen:
        frames = cody.frames_of(body)
        names = [frame.name for frame in frames]
        assert names.count("done") == 1 and names[-1] == "done", names
        assert names.count("error") <= 1, names
        if "error" in names:
            assert names[-2] == "error", names
        outcome = cody.chat_outcome([body], version)
        assert outcome.stalled is None and outcome.violations == [], outcome
        assert outcome.ended == ("error" if "error" in names else "complete"), outcome
        said = [frame.payload for frame in frames if frame.name == "completion"]
        return Seen(outcome.text, next(iter(outcome.errors), None), _silent(said))

    return read


def _silent(said: list[Mapping[str, Any]]) -> int:
    """How many of a Cody stream's events say nothing new."""
    pings, before = 0, ""
    for payload in said:
        if "completion" in payload:  # all of the text so far
            is_new = payload["completion"] != before or payload["stopReason"]
            before = payload["completion"]
        else:
            is_new = any(payload.values())
        pings += not is_new
    return pings


def _cody_text(reply: Any) -> str:
    assert isinstance(reply["stopReason"], str)
    return reply["completion"]


# ------------------------------------------------------------------------------ OpenAI


def _openai(text_of: Callable[[Any], str | None]) -> Callable[[bytes], Seen]:
    def read(body: bytes) -> Seen:
        seen, is_over, finishes = Seen(), False, 0
        for name, data in events(body):
            if name == ":":
                seen.pings += 1
                continue
            assert not is_over, f"after the end: {data!r}"
            if data == "[DONE]":
                is_over = True
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                seen.error, is_over = chunk["error"]["message"], True
                continue
            for choice in chunk.get("choices", ()):
                seen.text += text_of(choice) or ""
                finishes += choice["finish_reason"] is not None
        assert is_over and finishes <= 1
        assert (finishes == 1) or seen.error is not None
        return seen

    return read


def _delta_text(choice: Any) -> str | None:
    return choice["delta"].get("content")


def _choice_text(choice: Any) -> str | None:
    return choice["text"]


# --------------------------------------------------------------------------- Anthropic


def _anthropic(body: bytes) -> Seen:
    seen, is_over, names = Seen(), False, []
    for name, data in events(body):
        assert not is_over, f"after the end: {data!r}"
        payload = json.loads(data)
        assert payload["type"] == name
        names.append(name)
        if name == "ping":
            seen.pings += 1
        elif name == "error":
            seen.error, is_over = payload["error"]["message"], True
        elif name == "content_block_delta":
            seen.text += payload["delta"]["text"]
        elif name == "message_stop":
            is_over = True
    assert is_over
    said = [name for name in names if name != "ping"]
    assert said[0] == "message_start" or said == ["error"], names
    assert said.count("message_start") == (said != ["error"])
    return seen


# --------------------------------------------------------------------------------- TGI


def _tgi(body: bytes) -> Seen:
    seen, is_over = Seen(), False
    for name, data in events(body):
        if name == ":":
            seen.pings += 1
            continue
        assert not is_over, f"after the end: {data!r}"
        payload = json.loads(data)
        if "error" in payload:
            assert payload["error_type"]
            seen.error, is_over = payload["error"], True
            continue
        if not payload["token"]["special"]:
            seen.text += payload["token"]["text"]
        if payload["generated_text"] is not None:
            assert payload["generated_text"] == seen.text
            is_over = True
    assert is_over
    return seen


_CHAT = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]}
_CODY = {"messages": [{"speaker": "human", "text": PROMPT}], "maxTokensToSample": 99}
_STREAM = "/.api/completions/stream"

CODY = Dialect(
    "cody v2",
    f"{_STREAM}?api-version=2",
    _CODY,
    _cody(2),
    _cody_text,
    says_status=False,
)
CODY_1 = Dialect(
    "cody v1",
    f"{_STREAM}?api-version=1",
    _CODY,
    _cody(1),
    _cody_text,
    says_status=False,
)
LEGACY = Dialect("legacy", _STREAM, _CODY, _cody(0), _cody_text, says_status=False)
CHAT = Dialect(
    "openai chat",
    "/v1/chat/completions",
    _CHAT,
    _openai(_delta_text),
    lambda reply: reply["choices"][0]["message"]["content"],
)
COMPLETIONS = Dialect(
    "openai completions",
    "/v1/completions",
    {"model": MODEL, "prompt": PROMPT},
    _openai(_choice_text),
    lambda reply: reply["choices"][0]["text"],
    wants_completions=True,
)
ANTHROPIC = Dialect(
    "anthropic",
    "/v1/messages",
    {**_CHAT, "max_tokens": 99},
    _anthropic,
    lambda reply: reply["content"][0]["text"],
)
TGI = Dialect(
    "tgi",
    "/",
    {"inputs": PROMPT},
    _tgi,
    lambda reply: reply[0]["generated_text"],
    wants_completions=True,
)
GATEWAY = Dialect(
    "gateway",
    "/v1/completions/openai",
    {**_CHAT, "model": f"acme/{MODEL}"},
    _openai(_delta_text),
    lambda reply: reply["choices"][0]["message"]["content"],
    headers={"X-Sourcegraph-Feature": "chat_completions"},
)
DIALECTS = (CODY, CODY_1, LEGACY, CHAT, COMPLETIONS, ANTHROPIC, TGI, GATEWAY)
