"""What a Cody client asks of its instance, request by request, and how strictly it
reads the answers.

``CommandLine`` does what one ``cody chat -m …`` does, ``Editor`` what an editor does for
a manual autocomplete. A reply that the real client would trip over fails here.
"""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from tests.support.client import (
    RawReply,
    RawStream,
    request,
    stream,
)
from tests.support.cody import ChatOutcome, assert_ends_once, read_chat

Shape = Any
Json = dict[str, Any]

CLIENT = {
    "Connection": "close",
    "User-Agent": "cody-cli/5.5.22 (Node.js v20.20.2)",
    "X-Requested-With": "cody-cli 5.5.22",
    "X-Sourcegraph-API-Client-Name": "cody-cli",
    "X-Sourcegraph-API-Client-Version": "5.5.22",
}
CAPABILITIES = {"autocomplete", "chat", "edit", "vision", "reasoning", "tools"}
CATEGORIES = {"accuracy", "balanced", "speed", "other", "deprecated"}
STATUSES = {"experimental", "beta", "stable", "deprecated", "waitlist", "internal"}


# --- shapes ---------------------------------------------------------------------------


class Maybe:
    """Null, or of a shape."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape


def check(value: Any, shape: Shape, at: str = "data") -> None:
    """Fail unless ``value`` has all that ``shape`` has; more does not matter.

    A shape is a type, a dict or list of shapes, a ``Maybe``, a set of allowed values,
    a function that says whether it is right, or the very value.
    """
    if isinstance(shape, dict):
        assert isinstance(value, dict), f"{at}: {value!r}"
        for key, inner in shape.items():
            assert key in value, f"{at}: no {key!r}"
            check(value[key], inner, f"{at}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), f"{at}: {value!r}"
        for index, item in enumerate(value):
            check(item, shape[0], f"{at}[{index}]")
    elif isinstance(shape, Maybe):
        if value is not None:
            check(value, shape.shape, at)
    elif isinstance(shape, set):
        assert value in shape, f"{at}: {value!r}"
    elif isinstance(shape, type):
        right = isinstance(value, shape) and (shape is bool or value is not True)
        assert right, f"{at}: {value!r}"
    elif callable(shape):
        assert shape(value), f"{at}: {value!r}"
    else:
        assert value == shape and type(value) is type(shape), f"{at}: {value!r}"


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _json_object(value: Any) -> bool:
    return isinstance(value, str) and isinstance(json.loads(value), dict)


_NODES = {"nodes": [dict]}
_PAGE = {"hasNextPage": bool, "endCursor": Maybe(str)}
_RESULTS = {"search": {"results": {"results": [dict]}}}
_MODELS = {
    "site": {
        "codyLLMConfiguration": {
            "chatModel": _text,
            "chatModelMaxTokens": _positive,
            "fastChatModel": _text,
            "fastChatModelMaxTokens": _positive,
            "completionModel": _text,
            "completionModelMaxTokens": _positive,
            "smartContextWindow": {"enabled", "disabled"},
        }
    }
}
_PATTERNS = [{"repoNamePattern": _text}]


def _is_filters(raw: Any) -> bool:
    for patterns in raw.values():
        check(patterns, _PATTERNS, "ContextFilters")
    return bool(raw) and set(raw) <= {"include", "exclude"}


_PROMPTS = {"prompts": {**_NODES, "totalCount": int, "pageInfo": _PAGE}}

# What each operation's reply has to have for the client not to trip.
OPERATIONS: dict[str, Shape] = {
    "CurrentUser": {
        "currentUser": {
            "id": _text,
            "hasVerifiedEmail": bool,
            "displayName": Maybe(str),
            "username": _text,
            "avatarURL": Maybe(str),
            "primaryEmail": Maybe({"email": _text}),
            "organizations": _NODES,
        }
    },
    "SiteProductVersion": {
        "site": {
            "productVersion": lambda version: (
                _text(version) and len(version) <= 12 and "dev" not in version
            )
        }
    },
    "SiteHasCodyEnabled": {"site": {"isCodyEnabled": True}},
    "SiteGraphQLFields": {"__type": {"fields": [{"name": _text}]}},
    "CurrentSiteCodyLlmConfiguration": _MODELS,
    "CurrentSiteCodyLlmProvider": {
        "site": {"codyLLMConfiguration": {"provider": "sourcegraph"}}
    },
    "CodyConfigFeaturesResponse": {
        "site": {
            "codyConfigFeatures": {
                "chat": True,
                "autoComplete": True,
                "commands": True,
                "attribution": False,
            }
        }
    },
    "ViewerSettings": {"viewerSettings": {"final": _json_object}},
    "CodeSearchEnabled": {"codeSearchEnabled": False},
    "ContextFilters": {
        "site": {
            "codyContextFilters": {
                "raw": Maybe(_is_filters),
            }
        }
    },
    "EvaluateFeatureFlags": {"evaluateFeatureFlags": [{"name": _text, "value": bool}]},
    "FeatureFlags": {"evaluatedFeatureFlags": [{"name": _text, "value": bool}]},
    # True to each of them would stop the client: one is disable-network-requests.
    "EvaluateFeatureFlag": {"evaluateFeatureFlag": {None, False}},
    "RecordTelemetryEvents": {"telemetry": {"recordEvents": {"alwaysNil": None}}},
    "LogEventMutation": {"logEvent": {"alwaysNil": None}},
    "RecordContext": {"recordContext": {"alwaysNil": None}},
    "CurrentUserCodyProEnabled": {"currentUser": {"codyProEnabled": False}},
    "CurrentUserCodySubscription": {"currentUser": {"codySubscription": Maybe(dict)}},
    "CurrentUserRole": {"currentUser": {"id": _text, "siteAdmin": False}},
    "ViewerPrompts": _PROMPTS,
    "ViewerBuiltinPrompts": _PROMPTS,
    "PromptTags": {"promptTags": _NODES},
    "Repositories": {"repositories": {**_NODES, "pageInfo": {"endCursor": Maybe(str)}}},
    "RepositoriesSearch": {
        "repositories": {**_NODES, "pageInfo": {"endCursor": Maybe(str)}}
    },
    "Repository": {"repository": Maybe(dict)},
    "ResolveRepoName": {"repository": Maybe(dict)},
    "SuggestionsRepo": {"search": {"results": {"repositories": [dict]}}},
    "FuzzyFiles": _RESULTS,
    "FuzzySymbols": _RESULTS,
    "FileMatchSearchQuery": _RESULTS,
    "NLSSearchQuery": {
        "search": {"results": {"dynamicFilters": [dict], "results": [dict]}}
    },
    "FileContentsQuery": {"repository": Maybe(dict)},
    "GetRemoteFileQuery": {"repository": Maybe(dict)},
    "HighlightedFile": {"repository": Maybe(dict)},
    "GetURLContentQuery": {"urlMentionContext": Maybe(dict)},
    "GetCodyContext": {"getCodyContext": [dict]},
    "GetCodyContextAlternatives": {
        "getCodyContextAlternatives": {"contextLists": [dict]}
    },
    "SnippetAttribution": {"snippetAttribution": {"limitHit": bool, "nodes": [dict]}},
    "Packages": {
        "packageRepoReferences": {**_NODES, "pageInfo": {"endCursor": Maybe(str)}}
    },
    "DeleteAccessToken": {"deleteAccessToken": {"alwaysNil": None}},
    "SiteIdentification": {"site": {"siteID": _text}},
}
# Operations that only fail: there is nothing to create them in.
REFUSED = ("CreatePrompt", "ChangePromptVisibility")

CLIENT_CONFIG: Shape = {
    "codyEnabled": True,
    "chatEnabled": True,
    "autoCompleteEnabled": bool,
    "customCommandsEnabled": bool,
    "attributionEnabled": bool,
    "smartContextWindowEnabled": bool,
    "modelsAPIEnabled": bool,
    "latestSupportedCompletionsStreamAPIVersion": _positive,
}
SUPPORTED_MODELS: Shape = {
    "schemaVersion": _text,
    "revision": _text,
    "providers": [{"id": _text, "displayName": _text}],
    "models": [
        {
            "modelRef": lambda ref: len(ref.split("::")) == 3,
            "displayName": _text,
            "modelName": _text,
            "capabilities": lambda found: set(found) <= CAPABILITIES,
            "category": CATEGORIES,
            "status": STATUSES,
            "tier": {"free", "pro", "enterprise"},
            "contextWindow": {
                "maxInputTokens": _positive,
                "maxOutputTokens": _positive,
            },
        }
    ],
    "defaultModels": {"chat": _text, "fastChat": _text, "codeCompletion": _text},
}


def read_graphql(raw: RawReply, operation: str) -> Json:
    """Return ``data`` as the client takes it; anything else is an error to it."""
    assert raw.status == 200, (operation, raw.status, raw.body)
    assert raw.header("content-type") == "application/json"
    reply = raw.json()
    assert not reply.get("errors"), (operation, reply)
    assert reply.get("data") is not None, (operation, "response is missing data")
    check(reply["data"], OPERATIONS[operation], operation)
    data: Json = reply["data"]
    return data


def read_client_config(raw: RawReply) -> Json:
    assert raw.status == 200, raw.body
    config: Json = raw.json()
    check(config, CLIENT_CONFIG, "client-config")
    # The client throws at any other word.
    assert config.get("attribution", "none") in ("none", "permissive", "enforced")
    return config


def read_models(raw: RawReply) -> Json:
    assert raw.status == 200, raw.body
    models: Json = raw.json()
    check(models, SUPPORTED_MODELS, "supported-models")
    refs = {model["modelRef"] for model in models["models"]}
    assert set(models["defaultModels"].values()) <= refs
    assert b"serverSideConfig" not in raw.body
    return models


# --- clients --------------------------------------------------------------------------


class CommandLine:
    """``cody chat -m …``: signs in, looks round, picks the default model, asks.

    Request by request what version 5.5.22 did in front of this proxy, recorded on
    2026-11-20 (node 20.20): 70 requests, each on a connection of its own; their number
    grows with that of the feature flags, here 46.

    Args: prefix: of the endpoint; some versions keep it for GraphQL, and for that alone.
    """

    def __init__(self, url: str, token: str | None, prefix: str = "") -> None:
        self._url = url
        self._prefix = prefix
        self._headers = dict(CLIENT)
        if token is not None:
            self._headers["Authorization"] = f"token {token}"
        self.sent: Counter[str] = Counter()
        self.user: Json = {}
        self.config: Json = {}
        self.models: Json = {}

    async def chat(self, question: str) -> ChatOutcome:
        await self._sign_in()
        await asyncio.gather(
            self._graphql("CurrentSiteCodyLlmConfiguration"),
            self._graphql("CurrentSiteCodyLlmProvider"),
            self._graphql("CurrentSiteCodyLlmConfiguration"),
            self._flags(17),
        )
        await asyncio.gather(
            self._configure(),
            self._graphql("FeatureFlags"),
            self._graphql("ViewerSettings"),
            self._graphql("CodeSearchEnabled"),
        )
        await asyncio.gather(self._list_models(), self._graphql("CurrentUser"))
        await asyncio.gather(
            *(
                self._graphql(operation)
                for operation in ("SiteHasCodyEnabled", "CurrentUserCodySubscription")
                for _ in range(3)
            ),
            self._flags(14),
        )
        _, _, outcome = await asyncio.gather(
            self._telemetry("submitted"),
            self._telemetry("executed"),
            self._ask(question),
        )
        return outcome

    async def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        *,
        chunked: bool = False,
    ) -> RawReply:
        self.sent[path.partition("&")[0]] += 1
        every = self._headers | dict(headers or {})
        return await request(self._url, method, path, every, body, chunked)

    async def _sign_in(self) -> None:
        data, *_ = await asyncio.gather(
            self._graphql("CurrentUser"), self._graphql("CurrentUser")
        )
        self.user = data["currentUser"]
        _, _, _, site, _ = await asyncio.gather(
            self._telemetry("installed"),
            self._flags(15),
            self._graphql("CurrentUser"),
            self._graphql("SiteProductVersion"),
            self._telemetry("savedLogin"),
        )
        version = tuple(map(int, site["site"]["productVersion"].split(".")))
        assert version >= (5, 5, 0), "too old for the client configuration"

    async def _configure(self) -> None:
        self.config = read_client_config(await self.ask("GET", "/.api/client-config"))

    async def _list_models(self) -> None:
        path = "/.api/modelconfig/supported-models.json"
        self.models = read_models(await self.ask("GET", path))

    async def _flags(self, count: int) -> None:
        await asyncio.gather(
            *(
                self._graphql("EvaluateFeatureFlag", flagName=f"flag-{number}")
                for number in range(count)
            )
        )

    async def _telemetry(self, action: str) -> None:
        # With what must never be kept.
        await self._graphql("RecordTelemetryEvents", events=[_event(action)])

    async def _graphql(self, operation: str, **variables: object) -> Json:
        raw = await self.ask(
            "POST",
            f"{self._prefix}/.api/graphql?{operation}",
            # Empty parentheses are no GraphQL, and real.
            {"query": f"\nquery {operation}() {{ x }}", "variables": variables},
            {"Accept-Encoding": "gzip,deflate"},
        )
        return read_graphql(raw, operation)

    async def _ask(self, question: str) -> ChatOutcome:
        ref = self.models["defaultModels"]["chat"]
        model = next(m for m in self.models["models"] if m["modelRef"] == ref)
        version = self.config["latestSupportedCompletionsStreamAPIVersion"]
        raw = await self.ask(
            "POST",
            f"/.api/completions/stream?api-version={version}"
            "&client-name=jetbrains&client-version=5.5.22",
            {
                "temperature": 0.2,
                "topK": -1,
                "topP": -1,
                "model": ref,
                "maxTokensToSample": model["contextWindow"]["maxOutputTokens"],
                "messages": [
                    {"text": PREAMBLE, "speaker": "human"},
                    {"text": PREAMBLE_REPLY, "speaker": "assistant"},
                    {"text": question, "speaker": "human"},
                ],
            },
            {
                "Accept-Encoding": "gzip;q=0",
                "Connection": "keep-alive",
                "X-Sourcegraph-Interaction-ID": "b95d691f-f2a7-419e-832b-2c1442420d9b",
            },
            chunked=True,
        )
        if raw.status == 200:
            assert_ends_once(raw)
        return read_chat(raw, version)


PREAMBLE = (
    "You are Cody, an AI coding assistant from Sourcegraph. Answer positively without "
    "apologizing."
)
PREAMBLE_REPLY = "I am Cody, an AI coding assistant from Sourcegraph."
PRIVATE = "what the user typed in private"


def _event(action: str) -> Json:
    return {
        "feature": "cody.chat-question",
        "action": action,
        "source": {"client": "VSCode.Cody", "clientVersion": "5.5.22"},
        "parameters": {"version": 0, "privateMetadata": {"promptText": PRIVATE}},
    }


COMPLETION: Json = {
    "timeoutMs": 7000,
    "stopSequences": ["\n\n", "\n\r\n"],
    "maxTokensToSample": 256,
    "temperature": 0.2,
    "topK": 0,
    "messages": [
        {"speaker": "human", "text": "<fim_prefix>def f(<fim_suffix>)<fim_middle>"}
    ],
    "stream": True,
}


class Editor:
    """An editor's manual autocomplete: three equal requests at once. The first answer
    is taken, and the two others' connections are closed in mid-stream.
    """

    def __init__(self, url: str, token: str, version: int = 8) -> None:
        self._url = url
        self._path = (
            f"/.api/completions/code?api-version={version}"
            "&client-name=vscode&client-version=1.90.0"
        )
        self._headers = CLIENT | {
            "Connection": "keep-alive",
            "Authorization": f"token {token}",
            "Accept": "application/json",
            "Accept-Encoding": "gzip;q=0",
            "Content-Type": "application/json; charset=utf-8",
            "X-Timeout-Ms": "7000",
        }

    async def complete(
        self, enough: bytes, closed: Callable[[], Awaitable[None]]
    ) -> list[RawReply]:
        """Return the three replies: one whole, two as far as they were read.

        Args: enough: what has to be in each before the two are closed.
              closed: awaited when they are, before the first is read on.
        """
        async with contextlib.AsyncExitStack() as stack:
            first, *others = await asyncio.gather(
                *(stack.enter_async_context(self._ask()) for _ in range(3))
            )
            for each in (first, *others):
                await each.read_until(enough)
            for other in others:
                await other.close()
            await closed()
            await first.rest()
            return [first.reply, *(other.reply for other in others)]

    def _ask(self) -> contextlib.AbstractAsyncContextManager[RawStream]:
        return stream(
            self._url, path=self._path, headers=self._headers, body=COMPLETION
        )
