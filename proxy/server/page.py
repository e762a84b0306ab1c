"""A request that is no exchange."""

import asyncio
import contextlib
import re
import unicodedata
from collections.abc import Mapping
from urllib.parse import unquote

import msgspec
from aiohttp import web
from msgspec import json, structs

from proxy import pages, routes
from proxy.body import too_large
from proxy.dialects.adjust import decode_fields, encode_fields, raw
from proxy.dialects.base import JSON, Head, Reply
from proxy.dialects.gateway import Window
from proxy.errors import (
    InvalidRequest,
    MethodNotAllowed,
    ProxyError,
    ShuttingDown,
    Unauthorized,
    UnknownPath,
    UpstreamFault,
    UpstreamUnreachable,
)
from proxy.forward import forward
from proxy.instance import Page, Visit
from proxy.modelconfig.resolved import Model, Provider as ProviderSettings
from proxy.providers.base import join_url, token_query
from proxy.response import Response, own_headers
from proxy.server.request import AnyResponse, Request

# Forwarded paths whose bodies name a model.
_WITH_MODEL = {"/v1/embeddings", "/v1/responses", "/v1/messages/count_tokens"}
_LIST_S = 5.0
_MODEL_LISTS = ("/v1/models", "/.api/llm/models")
_PATH = re.compile(r"/(?:[!-$&-~]|%[0-9A-Fa-f]{2})*")
# In what a path stands for; the second is what bytes that are no UTF-8 become.
_NEVER_IN_PATH = re.compile("[\0-\x1f\x7f\ufffd]")
_MOST_ENCODINGS = 4


class PageRequest(Request):
    """A request that is no exchange: answered from the configuration, or handed on."""

    async def run(self) -> AnyResponse:
        try:
            if self._service.is_closed:
                raise ShuttingDown
            if (page := self._service.instance.page(self._head)) is not None:
                return await self._visit(page, self._head)
            if not self._is_known():
                raise UnknownPath(f"nothing is served at {self._path}")
            self._check_token(self._head)
            return await self._answer(self._head)
        except ProxyError as error:
            return self._respond(self._incoming.error_reply(self._noted(error)))
        except ConnectionError:
            raise
        except Exception:
            return self._respond(self._incoming.error_reply(self._noted(self._bug())))

    def _respond(self, reply: Reply) -> Response:
        self.response.reply(reply)
        return self.response

    async def _visit(self, page: Page, head: Head) -> Response:
        """Answer as a Sourcegraph instance does."""
        if head.method not in page.methods:
            allowed = {"Allow": ", ".join(page.methods)}
            raise MethodNotAllowed("Method Not Allowed", headers=allowed)
        if page.needs_token:
            self._check_token(head)
        body = await self._read_body() if head.method == "POST" else b""
        reply = page.answer(Visit(head, self.outcome.user, body))
        self.is_logged = page.is_logged
        if reply.status >= 400:  # a refusal in words of its own
            is_token = reply.status == Unauthorized.status
            self.outcome.kind = (Unauthorized if is_token else InvalidRequest).kind
        return self._say(reply)

    async def _answer(self, head: Head) -> AnyResponse:
        path, models = self._path, self._service.models
        is_get = head.method in ("GET", "HEAD")
        if is_get and path.startswith(_MODEL_LISTS):
            listed = pages.configured(models, refs=path.startswith("/.api/"))
            if self._service.settings.list_upstream_models:
                with self._service.interruptible():
                    listed += await self._reported({model.id for model in listed})
            anthropic = "anthropic-version" in head.headers
            return self._say(pages.model_list(path, listed, anthropic=anthropic))
        if is_get and path == routes.METRICS:
            accept = head.headers.get("Accept", "")
            return self._say(self._service.metrics_page(accept))
        if is_get and path == "/v1/limits":
            return self._say(pages.limits(models, await self._windows()))
        if path == "/v1/limits/refresh":  # there is nothing to refresh
            return self._say(Reply(200, JSON, b""))
        if is_get and path == "/":
            return await self._forward("/health")
        if is_get and path == "/info" and not self._is_tgi():
            return self._say(pages.info(models.choose("chat", "", False)))
        # An unknown path is handed on as it came, not as it reads.
        raw_path = self._request.rel_url.raw_path
        return await self._forward(routes.FORWARDED.get(path, raw_path))

    async def _windows(self) -> Mapping[str, Window]:
        if (door := self._service.admission) is None:
            return {}
        return await door.windows(self.outcome.user, self._client.remote)

    def _is_known(self) -> bool:
        path, is_get = self._path, self._request.method in ("GET", "HEAD")
        if path in routes.FORWARDED or path == "/v1/limits/refresh":
            return True
        own = ("/", "/v1/limits", routes.METRICS)
        if is_get and (path in own or path.startswith(_MODEL_LISTS)):
            return True
        return self._service.settings.passthrough and _is_forwardable(
            self._request.rel_url.raw_path
        )

    def _say(self, reply: Reply) -> Response:
        if self._refusal is not None:
            raise self._refusal
        return self._respond(reply)

    def _is_tgi(self) -> bool:
        models = self._service.models
        default = models.providers[models.choose("chat", "", False).provider_id]
        return default.type == "huggingface-tgi"

    async def _forward(self, path: str) -> web.StreamResponse:
        """Hand the request on; its model, if it names one, says to whom."""
        body, model = await self._named_model(path)
        settings = self._service.models.providers[model.provider_id]
        timeout_s = self._limit_s or settings.timeouts.chat_s
        door = self._service.admission
        # To be looked at is no work for a model.
        if door is None or self._request.method in ("GET", "HEAD"):
            return await self._hand_on(path, body, settings, timeout_s)
        async with self._place(door, "chat", settings.id, timeout_s):
            return await self._hand_on(path, body, settings, timeout_s)

    async def _hand_on(
        self,
        path: str,
        body: bytes | None,
        settings: ProviderSettings,
        timeout_s: float,
    ) -> web.StreamResponse:
        service = self._service
        limit = service.settings.limits.body_bytes
        if (self._request.content_length or 0) > limit:
            raise too_large(limit)
        provider, pool = service.providers[settings.id], service.pools[settings.id]
        self.outcome.provider = settings.id
        given = self._admit(settings)
        member = pool.pick(self._service.loop.time(), self)
        assert member is not None  # nobody was tried yet
        endpoint = member.endpoint
        self.outcome.endpoint = member.name
        if given:
            endpoint = structs.replace(endpoint, access_token=given, headers={})
        if body is None:
            self._continue()
        query = self._request.rel_url.raw_query_string
        queries = (query, token_query(endpoint))
        whole_query = "&".join(part for part in queries if part)
        fault: ProxyError | None = None
        is_complete = False
        try:
            with service.interruptible() as work:
                response = await forward(
                    self._request,
                    service.upstreams[settings.id],
                    join_url(provider.root(endpoint), path[1:], whole_query),
                    provider.credentials(endpoint),
                    endpoint.name,
                    own_headers(self.outcome.id) | self._cross_origin(),
                    self.outcome,
                    work,
                    body=body,
                    without=(service.settings.auth_header.lower(),),
                    limit_bytes=limit,
                    deadline_s=self.started_s + timeout_s,
                    is_optional=self._path in routes.FORWARDED,
                    clients_credential=settings.client_credentials,
                )
            is_complete = self.outcome.upstream_status < 500
            return response
        except UpstreamFault as error:
            fault = error
            if path == "/health" and isinstance(error, UpstreamUnreachable):
                error.status = 503
            raise
        finally:
            pool.finished(
                member, fault, self._service.loop.time(), self, is_complete=is_complete
            )

    def _cross_origin(self) -> dict[str, str]:
        origins = self._service.origins
        return {} if origins is None else origins.headers(self._head.headers)

    async def _named_model(self, path: str) -> tuple[bytes | None, Model]:
        models = self._service.models
        default = models.choose("chat", "", False)
        if path not in _WITH_MODEL or self._request.method != "POST":
            return None, default
        body = await self._read_body()
        fields = decode_fields(body)
        try:
            name = json.decode(fields["model"]) if "model" in fields else ""
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            raise InvalidRequest("model: expected a text") from None
        if not isinstance(name, str | None):
            raise InvalidRequest("model: expected a text")
        name = name or ""
        model = models.choose("chat", name, False)
        self.outcome.model = model.ref
        word = model.api_model or model.name
        if name and name != word:
            fields["model"] = raw(word)
            body = encode_fields(fields)
        return body, model

    async def _reported(self, known: set[str]) -> list[pages.Listed]:
        """Ask every upstream for its own list; one that does not answer has none."""
        found: list[pages.Listed] = []
        for settings in self._service.models.providers.values():
            provider = self._service.providers[settings.id]
            endpoint = settings.endpoints[0]
            url = join_url(provider.root(endpoint), "v1/models", token_query(endpoint))
            with contextlib.suppress(UpstreamFault, TimeoutError):
                async with asyncio.timeout(_LIST_S):
                    body = await self._service.upstreams[settings.id].get(
                        url, provider.credentials(endpoint), endpoint.name
                    )
                found += pages.reported(settings.id, body)
        return [model for model in found if model.id not in known]


def _is_forwardable(raw_path: str) -> bool:
    """Whether a path may go to an upstream: none of ours, in no disguise."""
    path = raw_path
    for _ in range(_MOST_ENCODINGS):
        decoded = unquote(path, errors="replace")
        if decoded == path:
            break
        path = decoded
    else:
        return False
    path = unicodedata.normalize("NFKC", path)
    # Some servers leave out what follows a semicolon in each segment.
    segments = [
        segment.partition(";")[0].strip()
        for segment in path.replace("\\", "/").lower().split("/")
    ]
    return (
        _PATH.fullmatch(raw_path) is not None
        and _NEVER_IN_PATH.search(path) is None
        and not {".", ".."} & set(segments)
        and next(filter(None, segments), "") != ".api"
    )
