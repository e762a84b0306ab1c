"""What every kind of upstream has in common: from a request to a call of it."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol
from urllib.parse import quote, urlsplit, urlunsplit

import msgspec

from proxy.completion import ROLES, CompletionRequest, ImagePart, Message, TextPart
from proxy.dialects.adjust import (
    Fix,
    decode_fields,
    encode_fields,
    fix_request,
    raw,
)
from proxy.dialects.base import EVENT_STREAM, JSON, Chosen, Reader
from proxy.errors import InvalidPrompt, InvalidRequest
from proxy.modelconfig.resolved import Endpoint, Model

# The end of the answer so far is compared with each of them, token by token.
MAX_STOPS = 128
MAX_STOP_CHARS = 1000


class Call(msgspec.Struct):
    """One call of an upstream, ready to be sent, and how to understand its reply.

    ``stops`` are cut at by us; ``ends`` are taken off the end of the answer.
    ``native`` is the client's dialect if the upstream speaks it too, so that its reply
    passes through; ``adjust`` if fix-ups are allowed then, ``several`` if several
    answers were asked for. ``adjusted`` names what of the request was changed.
    """

    url: str
    headers: dict[str, str]
    body: bytes
    reader: Reader
    stops: Sequence[str] = ()
    ends: Sequence[str] = ()
    native: str = ""
    adjust: bool = True
    several: bool = False
    adjusted: Sequence[str] = ()


class Asked(msgspec.Struct, frozen=True):
    """How the client asked: in which wire format, and at which path."""

    dialect: str
    path: str


class Native(msgspec.Struct, frozen=True):
    """An upstream that speaks the client's dialect: the same for all requests at one
    path for one model, streamed or not.

    ``model`` is what it calls the model, "" if its body does not say.
    """

    url: str
    headers: dict[str, str]
    reader: type[Reader]
    model: str = ""

    def pass_on(
        self,
        dialect: str,
        chosen: Chosen,
        model: Model,
        body: bytes,
        *,
        fixes: tuple[Fix, ...],
        adjust: bool,
    ) -> Call:
        """Return the call that hands the client's own bytes on.

        Only what must change does: the model's name and, with ``adjust``, what this kind
        of server refuses. What does not change keeps its bytes.
        """
        adjusted: Sequence[str] = ()
        if not adjust:
            fixes = ()
        is_other = self.model and chosen.model != self.model
        if is_other and not adjust:
            # Names that only the configuration knows must change, whatever was asked.
            name = (chosen.model or "").strip()
            is_other = name not in ("", model.api_model or model.name)
        if is_other or fixes:
            fields = decode_fields(body)
            before = dict(fields)
            if is_other:
                fields["model"] = raw(self.model)
            if fixes:
                adjusted = fix_request(fixes, fields)
            if fields != before:
                body = encode_fields(fields)
        return Call(
            self.url,
            self.headers,
            body,
            self.reader(),
            native=dialect,
            adjust=adjust,
            several=chosen.is_several,
            adjusted=adjusted,
        )


class Provider(Protocol):
    """``source`` is what Cody clients know this kind of upstream as, in errors."""

    source: str

    def call(
        self, request: CompletionRequest, model: Model, endpoint: Endpoint
    ) -> Call:
        """Raises: InvalidPrompt: this kind of upstream cannot take such messages."""
        ...

    def native(
        self, asked: Asked, request: CompletionRequest, model: Model, endpoint: Endpoint
    ) -> Native | None:
        """Where this upstream speaks the client's own dialect; None if it does not."""
        ...

    def credentials(self, endpoint: Endpoint) -> dict[str, str]:
        """The headers that let us in."""
        ...

    def root(self, endpoint: Endpoint) -> str:
        """The URL below which the server has its paths, ``/v1/…`` among them."""
        ...


def prepare(request: CompletionRequest, model: Model) -> CompletionRequest:
    """Return the request as this model is to get it: its name, limits and template.

    Raises: InvalidPrompt: a speaker nobody knows, or images for a blind model.
    """
    for message in request.messages:
        if message.role not in ROLES:
            raise InvalidPrompt(f"unexpected role: {message.role}")
    if "vision" not in model.capabilities and _has_image(request.messages):
        raise InvalidPrompt(
            f'model "{model.ref}" does not take images; if it does, add "vision" to '
            "its capabilities in modelConfiguration"
        )
    if request.stop:
        _check_stops(request.stop)
    prepared = msgspec.structs.replace(request, model=model.api_model or model.name)
    if model.strict_template:
        prepared.messages = fold(request.messages)
    limit = model.context_window.max_output_tokens
    if (request.max_tokens or 0) > limit:
        request.dropped.append("max_tokens")
        prepared.max_tokens = limit
    if request.stop or model.stop:
        prepared.stop = [*dict.fromkeys((*request.stop, *model.stop))]
    if not request.reasoning_effort:
        prepared.reasoning_effort = model.reasoning_effort
    return prepared


def _check_stops(stops: list[str]) -> None:
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(
            f"{len(stops)} stop sequences; at most {MAX_STOPS} are taken"
        )
    if any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise InvalidRequest(
            f"a stop sequence has more than {MAX_STOP_CHARS} characters"
        )


def _has_image(messages: list[Message]) -> bool:
    for message in messages:
        for part in message.parts:
            if isinstance(part, ImagePart):
                return True
    return False


def fold(messages: list[Message]) -> list[Message]:
    """Return the messages as strict chat templates want them (Mistral, Gemma).

    They take no system role and only alternating ones, starting with the user: the
    system prompt goes in front of the first question, neighbours are joined, both
    with a blank line between. A last assistant message, the beginning of an answer,
    becomes part of the question.
    """
    folded: list[Message] = []
    is_asked = False  # an answer to nothing but the system prompt is none
    for message in messages:
        role = "user" if message.role == "system" else message.role
        if message.is_empty or (role == "assistant" and not is_asked):
            continue
        is_asked = is_asked or message.role == "user"
        if role == "assistant" and message is messages[-1]:
            # Nobody continues it here, so it is asked for.
            role = "user"
            prefix = TextPart("Begin your answer with:\n")
            message = Message(role, [prefix, *message.parts])
        if folded and folded[-1].role == role:
            parts = [*folded[-1].parts, TextPart("\n\n"), *message.parts]
            folded[-1] = Message(role, parts)
        else:
            folded.append(Message(role, message.parts))
    # Nothing but an answer without its question: then it is the question.
    return folded or [Message("user", message.parts) for message in messages[-1:]]


@lru_cache(maxsize=1024)
def join_url(url: str, path: str, query: str = "") -> str:
    """Append ``path`` to the URL's path and ``query`` to its query string."""
    scheme, host, base, old_query, _ = urlsplit(url)
    joined = f"{base.rstrip('/')}/{path}" if path else base
    return urlunsplit(
        (scheme, host, joined, "&".join(filter(None, (old_query, query))), "")
    )


def above(url: str, end: str) -> str:
    """Return the URL without what its path ends with; its query stays."""
    scheme, host, path, query, _ = urlsplit(url)
    return urlunsplit((scheme, host, path.rstrip("/").removesuffix(end), query, ""))


@lru_cache(maxsize=1024)
def replace_path(url: str, path: str) -> str:
    """Keep only scheme and host of the URL."""
    scheme, host, *_ = urlsplit(url)
    return urlunsplit((scheme, host, path, "", ""))


def token_query(endpoint: Endpoint) -> str:
    """The query parameter that carries the token, for endpoints that want that."""
    if not endpoint.access_token_query:
        return ""
    return f"{quote(endpoint.access_token_query)}={quote(endpoint.access_token)}"


def headers_for(
    request: CompletionRequest,
    endpoint: Endpoint,
    credentials: dict[str, str],
    api: dict[str, str] | None = None,
) -> dict[str, str]:
    """The headers of a call. Configured ones replace the token and win over ours."""
    return {
        "Content-Type": JSON,
        "Accept": EVENT_STREAM if request.stream else JSON,
        # A compressed stream comes in lumps.
        "Accept-Encoding": "identity",
        **(api or {}),
        **({} if endpoint.headers else credentials),
        **endpoint.headers,
    }


def own_credentials(endpoint: Endpoint, credentials: dict[str, str]) -> dict[str, str]:
    """Configured headers replace what would be made of the token."""
    return endpoint.headers or credentials


def bearer(endpoint: Endpoint) -> dict[str, str]:
    if not endpoint.access_token or endpoint.access_token_query:
        return {}
    return {"Authorization": f"Bearer {endpoint.access_token}"}
