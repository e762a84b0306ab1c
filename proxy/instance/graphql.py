"""``POST /.api/graphql?<Operation>``: an answer per operation name.

No query is ever parsed: clients send some that are no GraphQL (``query PromptTags()``).
What one name means has grown over the years, so each reply has all that any client
asked under it; clients do not look at the rest. Variables are not looked at either,
telemetry's least of all: it may hold prompts.
"""

import base64
import re
from collections.abc import Callable, Iterator, Mapping

import msgspec

from proxy.config import Settings, Token
from proxy.dialects.base import JSON, Reply
from proxy.modelconfig.resolved import ModelConfiguration

_HEADERS = {"X-Content-Type-Options": "nosniff"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)
_IN_QUERY = re.compile(
    r"\b(?:query|mutation|subscription)\s+([A-Za-z_][A-Za-z0-9_]{0,63})", re.ASCII
)
# How far the beginning of a query may be from the beginning of its text.
_BEGINNING_CHARS = 1000

_encode = msgspec.json.Encoder().encode

_NONE: dict[str, object] = {"nodes": []}
_PAGE = {"hasNextPage": False, "endCursor": None}
_PROMPTS = {"prompts": {"nodes": [], "totalCount": 0, "pageInfo": _PAGE}}
_NO_RESULTS: dict[str, object] = {
    "search": {"results": {"results": [], "dynamicFilters": []}}
}
_NO_REPOSITORY = {"repository": None}
_DONE = {"alwaysNil": None}

# Operation -> data, where it is the same for everybody.
_STATIC: dict[str, object] = {
    "SiteHasCodyEnabled": {"site": {"isCodyEnabled": True}},
    "SiteGraphQLFields": {
        "__type": {
            "fields": [
                {"name": name}
                for name in (
                    *("id", "siteID", "productVersion", "isCodyEnabled"),
                    *("codyLLMConfiguration", "codyConfigFeatures"),
                    *("codyContextFilters", "viewerCanAdminister"),
                )
            ]
        }
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
    # Not an object: a text that is JSON.
    "ViewerSettings": {"viewerSettings": {"final": "{}"}},
    "CodeSearchEnabled": {"codeSearchEnabled": False},
    # Never all true: disable-network-requests is one of them.
    "EvaluateFeatureFlags": {"evaluateFeatureFlags": []},
    "FeatureFlags": {"evaluatedFeatureFlags": []},
    "EvaluateFeatureFlag": {"evaluateFeatureFlag": None},
    "RecordTelemetryEvents": {"telemetry": {"recordEvents": _DONE}},
    "LogEventMutation": {"logEvent": _DONE},
    "RecordContext": {"recordContext": _DONE},
    "CurrentUserCodyProEnabled": {"currentUser": {"codyProEnabled": False}},
    "CurrentUserCodySubscription": {"currentUser": {"codySubscription": None}},
    "ViewerPrompts": _PROMPTS,
    "ViewerBuiltinPrompts": _PROMPTS,
    "PromptTags": {"promptTags": _NONE | {"totalCount": 0, "pageInfo": _PAGE}},
    "Repositories": {"repositories": {"nodes": [], "pageInfo": _PAGE}},
    "RepositoriesSearch": {"repositories": {"nodes": [], "pageInfo": _PAGE}},
    "Repository": _NO_REPOSITORY,
    "ResolveRepoName": _NO_REPOSITORY,
    "SuggestionsRepo": {"search": {"results": {"repositories": []}}},
    "FuzzyFiles": _NO_RESULTS,
    "FuzzySymbols": _NO_RESULTS,
    "FileMatchSearchQuery": _NO_RESULTS,
    "NLSSearchQuery": _NO_RESULTS,
    "FileContentsQuery": _NO_REPOSITORY,
    "GetRemoteFileQuery": _NO_REPOSITORY,
    "HighlightedFile": _NO_REPOSITORY,
    "GetURLContentQuery": {"urlMentionContext": None},
    "GetCodyContext": {"getCodyContext": []},
    "GetCodyContextAlternatives": {"getCodyContextAlternatives": {"contextLists": []}},
    "SnippetAttribution": {"snippetAttribution": {"limitHit": False, "nodes": []}},
    "Packages": {"packageRepoReferences": {"nodes": [], "pageInfo": _PAGE}},
    "DeleteAccessToken": {"deleteAccessToken": _DONE},
}
# Clients show the reason.
_REFUSED = dict.fromkeys(
    ("CreatePrompt", "ChangePromptVisibility"),
    "not supported: there is no Sourcegraph instance behind this proxy",
)


class _Body(msgspec.Struct):
    query: str = ""


_decode = msgspec.json.Decoder(_Body).decode


class Operations:
    """The answers, each made once."""

    def __init__(self, settings: Settings) -> None:
        data = _STATIC | _of_site(settings)
        self._replies = {name: _said(answer) for name, answer in data.items()}
        for name, text in _REFUSED.items():
            self._replies[name] = _refused(text)
        # The first is for where no token is asked for.
        users = (Token("", b""), *settings.tokens)
        self._users = {
            "CurrentUser": _by_user(users, _user),
            "CurrentUserRole": _by_user(users, _role),
        }

    def answer(self, query: Mapping[str, str], body: bytes, user: str) -> Reply:
        """Return the reply to the operation that the URL names, or else the body.

        Args: user: the name of the token that asks, "" where none is asked for.
        """
        name = self._known_in(query)
        if not name:
            try:
                name = self._name(query, _decode(body).query)
            except (msgspec.DecodeError, UnicodeError, RecursionError):
                return _refused('expected JSON: {"query": "query …"}', status=400)
        if name in self._users:
            return self._users[name][user]
        if name in self._replies:
            return self._replies[name]
        if not name:
            return _refused(
                "no operation: name it in the URL, ?<Operation>, or in the query",
                status=400,
            )
        # On these words clients take us for an instance from before the field was.
        return _refused(f'Cannot query field "{name}" (not supported by this proxy)')

    def _known_in(self, query: Mapping[str, str]) -> str:
        return next((name for name in query if self._is_known(name)), "")

    def _is_known(self, name: str) -> bool:
        return name in self._replies or name in self._users

    def _name(self, query: Mapping[str, str], text: str) -> str:
        """Return what is asked for, "" if nothing is: a name, if an unknown one."""
        found = _IN_QUERY.search(text[:_BEGINNING_CHARS])
        names = [found[1]] if found else []
        names += _plain_names(query)
        return next(filter(self._is_known, names), names[0] if names else "")


def _plain_names(query: Mapping[str, str]) -> Iterator[str]:
    # What is repeated to the client is a name, and nothing that it could take for
    # anything else.
    return (name for name in query if _NAME.fullmatch(name))


def _said(data: object) -> Reply:
    return Reply(200, JSON, _encode({"data": data}), _HEADERS)


def _refused(text: str, status: int = 200) -> Reply:
    body = {"data": None, "errors": [{"message": text}]}
    return Reply(status, JSON, _encode(body), _HEADERS)


# ------------------------------------------------------------------------------- site


def _of_site(settings: Settings) -> dict[str, object]:
    """What depends on the configuration, and on it alone."""
    instance = settings.instance
    version = {
        "productVersion": instance.site_version,
        "siteID": "completions-proxy",
        "isCodyEnabled": True,
        "productSubscription": {"license": {"hashedKey": ""}},
    }
    configuration = _llm_configuration(settings.models)
    filters = instance.context_filters
    # null includes everything; anything that clients do not understand excludes it.
    raw = None
    if filters is not None and (filters.include or filters.exclude):
        raw = {
            name: [{"repoNamePattern": each.repo_name_pattern} for each in patterns]
            for name, patterns in (
                ("include", filters.include),
                ("exclude", filters.exclude),
            )
            if patterns
        }
    return {
        "SiteProductVersion": {"site": version},
        "SiteIdentification": {"site": version},
        "CurrentSiteIdentification": {"site": version},
        "CurrentSiteCodyLlmConfiguration": {
            "site": {"codyLLMConfiguration": configuration}
        },
        "CurrentSiteCodyLlmProvider": {"site": {"codyLLMConfiguration": configuration}},
        "ContextFilters": {"site": {"codyContextFilters": {"raw": raw}}},
    }


def _llm_configuration(models: ModelConfiguration) -> dict[str, object]:
    """For clients that know no list of models: one of each kind."""
    by_ref = {model.ref: model for model in models.models}
    defaults = models.default_models
    wire: dict[str, object] = {
        "provider": "sourcegraph",
        "smartContextWindow": "enabled",
    }
    for name, ref in (
        ("chatModel", defaults.chat),
        ("fastChatModel", defaults.fast_chat),
        ("completionModel", defaults.code_completion),
    ):
        model = by_ref[ref]
        wire[name] = f"{model.provider_id}/{model.id}"
        window = model.client_window or model.context_window
        wire[f"{name}MaxTokens"] = window.max_input_tokens
    return wire


# ------------------------------------------------------------------------------ users


def _by_user(
    users: tuple[Token, ...], make: Callable[[int, Token], dict[str, object]]
) -> dict[str, Reply]:
    return {
        token.name: _said({"currentUser": make(number, token)})
        for number, token in enumerate(users)
    }


def _user(number: int, token: Token) -> dict[str, object]:
    return {
        **_role(number, token),
        "hasVerifiedEmail": True,
        "displayName": None,
        # The command line takes an empty one for a failure.
        "username": token.name or "user",
        "avatarURL": None,
        "primaryEmail": {"email": token.email} if token.email else None,
        "organizations": _NONE,
        "codyProEnabled": False,
    }


def _role(number: int, token: Token) -> dict[str, object]:
    return {
        "id": base64.b64encode(b"User:%d" % number).decode(),
        "siteAdmin": False,
    }
