"""What the proxy says in place of a Sourcegraph instance, over real sockets."""

import asyncio
import html
import json
import re
import time
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import example, given, strategies as st

from proxy.errors import ConfigError
from proxy.instance.graphql import Operations
from proxy.instance.sign_in import callback
from tests.support.client import connect, request
from tests.support.cody import assert_ends_once, read_autocomplete, read_chat
from tests.support.fixtures import (
    QUESTION,
    Block,
    RunningProxy,
    Starter,
    load,
    model_configuration,
)
from tests.support.instance import (
    COMPLETION,
    OPERATIONS,
    PREAMBLE,
    PREAMBLE_REPLY,
    PRIVATE,
    REFUSED,
    CommandLine,
    Editor,
    check,
    read_client_config,
    read_graphql,
    read_models,
)
from tests.support.upstream import (
    ScriptedUpstream,
    Wait,
    chunk,
    data,
    openai_chunks,
    sse,
    sse_head,
)

TOKEN = "cp_ann"
AUTH: Block = {
    "tokens": [
        {"name": "ann", "token": TOKEN, "email": "ann@example.com"},
        {"name": "<b>ben</b>", "token": "cp_ben"},
    ]
}
ANSWER = sse(*openai_chunks(["Hel", "lo"]))
GRAPHQL = "/.api/graphql"


def bearing(token: str = TOKEN) -> dict[str, str]:
    return {"Authorization": f"token {token}"}


async def get(proxy: RunningProxy, path: str, token: str = TOKEN, **headers: str):
    return await request(proxy.url, "GET", path, bearing(token) | headers)


async def ask(
    proxy: RunningProxy, operation: str, token: str = TOKEN, body: Any = None
):
    return await request(
        proxy.url,
        path=f"{GRAPHQL}?{operation}",
        headers=bearing(token),
        body=body or {"query": f"query {operation} {{ x }}", "variables": {}},
    )


@pytest.fixture
async def proxy(start: Starter, upstream: ScriptedUpstream) -> RunningProxy:
    upstream.script(ANSWER)
    return await start(model_configuration(upstream.url), auth=AUTH)


# --------------------------------------------------------------------- whole clients


@pytest.mark.parametrize("prefix", ["", "/sourcegraph"])
async def test_the_command_line_signs_in_and_chats(proxy, upstream, prefix):
    client = CommandLine(proxy.url, TOKEN, prefix)
    outcome = await client.chat("hi")
    assert (outcome.text, outcome.ended) == ("Hello", "complete")
    assert outcome.violations == []
    assert client.user["username"] == "ann"
    assert client.user["primaryEmail"] == {"email": "ann@example.com"}
    assert client.sent.total() == 70
    assert client.sent[f"{prefix}{GRAPHQL}?EvaluateFeatureFlag"] == 46
    assert len(upstream.requests) == 1  # with the category "speed" it would be two
    assert upstream.last.json()["messages"][-1]["content"] == "hi"


async def test_the_command_line_finds_a_wrong_token(proxy):
    client = CommandLine(proxy.url, "cp_wrong")
    with pytest.raises(AssertionError, match=r"CurrentUser.*401.*Invalid access token"):
        await client.chat("hi")


async def test_telemetry_is_taken_and_neither_kept_nor_logged(proxy):
    await CommandLine(proxy.url, TOKEN).chat("hi")
    traces = {"resourceSpans": [{"attributes": [PRIVATE]}]}
    raw = await request(proxy.url, path="/-/debug/otlp/v1/traces", body=traces)
    assert (raw.status, raw.json()) == (200, {})
    assert PRIVATE not in proxy.log
    routes = [line["route"] for line in proxy.outcomes]
    assert routes == [
        "/.api/client-config",
        "/.api/modelconfig/supported-models.json",
        "/.api/completions/stream",
    ]
    assert {line["kind"] for line in proxy.outcomes} == {"ok"}


async def test_three_equal_completions_of_which_two_are_closed(
    start: Starter, upstream: ScriptedUpstream
):
    proxy = await start(model_configuration(upstream.url), auth=AUTH)
    goes_on = asyncio.Event()
    begun = [{"text": "x: int", "finish_reason": None}]
    ended = [{"text": " = 1", "finish_reason": "stop"}]
    upstream.script(
        [
            sse_head(),
            chunk(data({"choices": begun})),
            Wait(goes_on),
            chunk(data({"choices": ended})),
            *(chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"),
        ]
    )

    async def closed() -> None:
        await eventually(lambda: sum(r.peer_closed for r in upstream.requests) == 2)
        goes_on.set()

    replies = await Editor(proxy.url, TOKEN).complete(b"deltaText", closed)
    assert_ends_once(replies[0])
    outcome = read_autocomplete(replies[0], 8)
    assert (outcome.text, outcome.stop_reason) == ("x: int = 1", "stop")
    assert not any(reply.complete for reply in replies[1:])
    first, *others = (each.json() for each in upstream.requests)
    assert others == [first, first]
    assert first["prompt"] == COMPLETION["messages"][0]["text"]
    await eventually(lambda: len(proxy.outcomes) == 3)
    kinds = sorted(line["kind"] for line in proxy.outcomes)
    assert kinds == ["client_gone", "client_gone", "ok"]


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  (there is no event to wait for)
            await asyncio.sleep(0.01)


# --------------------------------------------------------------------------- GraphQL


@given(st.binary(), st.text())
@example(b'{"query":"query \\ud800 { x }"}', "")
def test_whatever_is_asked_gets_an_answer(body, name):
    file = {"modelConfiguration": model_configuration("http://up")}
    reply = Operations(load(file)).answer({name: ""}, body, "")
    assert reply.status in (200, 400)
    assert set(json.loads(reply.body)) <= {"data", "errors"}


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_every_operation_has_the_shape_that_clients_need(proxy, operation):
    read_graphql(await ask(proxy, operation), operation)
    # Older clients name it in the text alone.
    body = {
        "query": f"\n  query {operation}($a: String) {{ x }}",
        "variables": {"a": 1},
    }
    raw = await request(proxy.url, path=GRAPHQL, headers=bearing(), body=body)
    read_graphql(raw, operation)


@pytest.mark.parametrize("operation", REFUSED)
async def test_what_would_need_an_instance_is_refused(proxy, operation):
    reply = (await ask(proxy, operation)).json()
    assert reply["data"] is None
    assert "no Sourcegraph instance" in reply["errors"][0]["message"]


async def test_an_unknown_operation_looks_like_one_of_a_later_release(proxy):
    raw = await ask(proxy, "WhatIsNew")
    assert raw.status == 200
    text = 'Cannot query field "WhatIsNew" (not supported by this proxy)'
    assert raw.json() == {"data": None, "errors": [{"message": text}]}


async def test_each_token_has_its_own_user(proxy):
    ann = read_graphql(await ask(proxy, "CurrentUser"), "CurrentUser")
    ben = read_graphql(await ask(proxy, "CurrentUser", "cp_ben"), "CurrentUser")
    assert ann["currentUser"]["id"] != ben["currentUser"]["id"]
    assert ben["currentUser"]["username"] == "<b>ben</b>"
    assert ben["currentUser"]["primaryEmail"] is None


async def test_without_tokens_everybody_is_somebody(start: Starter, upstream):
    proxy = await start(model_configuration(upstream.url))
    for token in ("", "whatever"):
        user = read_graphql(await ask(proxy, "CurrentUser", token), "CurrentUser")
        assert user["currentUser"]["username"] == "user"


async def test_the_site_is_what_the_configuration_says(start: Starter, upstream):
    filters = {"include": [{"repoNamePattern": "^a"}], "exclude": []}
    own = {"siteVersion": "6.3.0", "apiVersion": 5, "contextFilters": filters}
    proxy = await start(model_configuration(upstream.url), instance=own)
    site = read_graphql(await ask(proxy, "SiteProductVersion"), "SiteProductVersion")
    assert site["site"]["productVersion"] == "6.3.0"
    found = read_graphql(await ask(proxy, "ContextFilters"), "ContextFilters")
    raw = found["site"]["codyContextFilters"]["raw"]
    assert raw == {"include": [{"repoNamePattern": "^a"}]}
    config = read_client_config(await get(proxy, "/.api/client-config"))
    assert config["latestSupportedCompletionsStreamAPIVersion"] == 5


async def test_context_filters_include_everything_by_default(proxy):
    found = read_graphql(await ask(proxy, "ContextFilters"), "ContextFilters")
    assert found["site"]["codyContextFilters"]["raw"] is None


async def test_models_of_clients_without_a_list_can_be_asked(proxy, upstream):
    operation = "CurrentSiteCodyLlmConfiguration"
    found = read_graphql(await ask(proxy, operation), operation)
    models = found["site"]["codyLLMConfiguration"]
    assert models["chatModelMaxTokens"] == 8000
    raw = await proxy.chat(QUESTION | {"model": models["chatModel"]}, headers=bearing())
    assert read_chat(raw, 2).text == "Hello"


@pytest.mark.parametrize(
    ("instance", "problem"),
    [
        ({"siteVersion": "6.2"}, "instance.siteVersion: expected a version like"),
        ({"siteVersion": "100.200.30000"}, "instance.siteVersion: expected a version"),
        ({"apiVersion": 9}, "instance.apiVersion: expected 1 to 8"),
        ({"apiVersion": 0}, "instance.apiVersion: expected an integer above 0"),
        ({"contextFilters": {"only": []}}, "instance.contextFilters.only: unknown key"),
        (
            {"contextFilters": {"include": [{"pattern": "a"}]}},
            "instance.contextFilters.include[0].repoNamePattern: missing",
        ),
    ],
)
def test_what_an_instance_cannot_be(instance, problem):
    file = {
        "modelConfiguration": model_configuration("http://up"),
        "instance": instance,
    }
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert any(each.startswith(problem) for each in caught.value.problems)


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("headers", "text"),
    [
        ({}, "cody is not enabled: not authenticated\n"),
        (bearing("cp_wrong"), "Invalid access token.\n"),
        (bearing(""), "Invalid access token.\n"),
        ({"Authorization": "Basic eA=="}, None),
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", f"{GRAPHQL}?CurrentUser"),
        ("POST", f"/a/prefix{GRAPHQL}?CurrentUser"),
        ("GET", "/.api/client-config"),
        ("GET", "/.api/modelconfig/supported-models.json"),
        ("GET", "/.api/rules"),
        ("GET", "/.api/usage"),
    ],
)
async def test_no_token_or_a_wrong_one(proxy, method, path, headers, text):
    raw = await request(proxy.url, method, path, headers, body={} if headers else None)
    assert raw.status == 401
    assert raw.header("content-type") == "text/plain; charset=utf-8"
    assert text is None or raw.text == text
    # Clients would take it for a challenge of a proxy in between.
    assert not [name for name, _ in raw.headers if "challenge" in name.lower()]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not JSON",
        b"[1,2]",
        b'{"query":1}',
        b'{"query":"hello"}',
        b'{"query":"{ site { id } }"}',
        b'{"query":',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
async def test_what_is_no_graphql(proxy, body):
    raw = await request(proxy.url, path=GRAPHQL, headers=bearing(), body=body)
    assert raw.status == 400
    assert raw.header("content-type") == "application/json"
    reply = raw.json()
    assert reply["data"] is None
    assert reply["errors"][0]["message"].startswith(("expected JSON", "no operation"))
    assert proxy.outcomes[-1]["kind"] == "bad_request"


async def test_the_name_in_the_url_is_enough(proxy):
    raw = await request(
        proxy.url, path=f"{GRAPHQL}?CurrentUser", headers=bearing(), body=b"not JSON"
    )
    read_graphql(raw, "CurrentUser")


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        "%3Cscript%3Ealert(1)%3C/script%3E",
        "A" * 5000,
        "a%00b",
        "%F0%9F%98%80",
    ],
)
async def test_an_odd_operation_name_is_never_repeated(proxy, name):
    raw = await request(
        proxy.url, path=f"{GRAPHQL}?{name}", headers=bearing(), body={"query": name}
    )
    assert raw.status == 400
    assert raw.header("content-type") == "application/json"
    assert raw.header("x-content-type-options") == "nosniff"
    assert b"script" not in raw.body and b"AAAA" not in raw.body
    assert "script" not in proxy.log


async def test_ten_megabytes_of_variables(proxy):
    body = b'{"query":"query WhatIsNew { x }","variables":{"a":"%b"}}' % (b"x" * 10**7)
    raw = await request(proxy.url, path=GRAPHQL, headers=bearing(), body=body)
    assert "Cannot query field" in raw.json()["errors"][0]["message"]
    started_s = time.perf_counter()
    raw = await request(
        proxy.url, path=f"{GRAPHQL}?CurrentUser", headers=bearing(), body=body
    )
    read_graphql(raw, "CurrentUser")
    assert time.perf_counter() - started_s < 2


async def test_more_than_the_limit_is_too_much(start: Starter, upstream):
    block = model_configuration(upstream.url)
    proxy = await start(block, auth=AUTH, limits={"bodyBytes": 1000})
    body = {"query": "query A { x }", "variables": "x" * 1000}
    raw = await ask(proxy, "CurrentUser", body=body)
    assert raw.status == 413
    assert "limits.bodyBytes" in raw.text


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", GRAPHQL, "POST"),
        ("POST", "/.api/client-config", "GET, HEAD"),
        ("DELETE", "/user/settings/tokens/new", "GET, HEAD, POST"),
    ],
)
async def test_other_methods(proxy, method, path, allowed):
    raw = await request(proxy.url, method, path, bearing())
    assert (raw.status, raw.header("allow")) == (405, allowed)


async def test_a_body_that_does_not_come(start: Starter, upstream):
    block = model_configuration(upstream.url)
    proxy = await start(block, auth=AUTH, timeouts={"chat": 0.2})
    async with connect(proxy.url) as connection:
        await connection.send(
            f"POST {GRAPHQL}?CurrentUser HTTP/1.1\r\nHost: a\r\n"
            f"Authorization: token {TOKEN}\r\nContent-Length: 9\r\n\r\n{{".encode()
        )
        assert (await connection.reply()).status == 408


# ---------------------------------------------------------------------- other replies


async def test_models_as_clients_list_them(start: Starter, upstream):
    block = model_configuration(upstream.url)
    block["providerOverrides"][0]["displayName"] = "Acme"
    block["modelOverrides"][0] |= {
        "displayName": "Large",
        "capabilities": ["chat", "autocomplete", "reasoning"],
        "reasoningEffort": "high",
        "modelCost": {"inputTokenPennies": 3},
        "contextWindow": {
            "maxInputTokens": 8000,
            "maxOutputTokens": 5000,
            "maxUserInputTokens": 4000,
        },
        "clientSideConfig": {
            "openaicompatible": {
                "chatTopK": 5,
                "chatTopP": 0.5,
                "stopSequences": ["<end>"],
                "contextSizeHintTotalCharacters": 9000,
            }
        },
    }
    block["defaultModels"] |= {"unlimitedChat": "acme::v1::large", "fallbackChat": "x"}
    proxy = await start(block)
    models = read_models(await get(proxy, "/.api/modelconfig/supported-models.json"))
    assert models["providers"] == [{"id": "acme", "displayName": "Acme"}]
    assert models["models"] == [
        {
            "modelRef": "acme::v1::large",
            "displayName": "Large",
            "modelName": "large-1",
            "capabilities": ["chat", "autocomplete", "reasoning", "edit"],
            "category": "balanced",
            "status": "stable",
            "tier": "enterprise",
            "contextWindow": {
                "maxInputTokens": 8000,
                "maxOutputTokens": 5000,
                "maxUserInputTokens": 4000,
            },
            "clientSideConfig": {
                "openAICompatible": {
                    "chatTopK": 5,
                    "chatTopP": 0.5,
                    "stopSequences": ["<end>"],
                    "contextSizeHintTotalCharacters": 9000,
                }
            },
            "reasoningEffort": "high",
            "modelCost": {
                "unit": "mtok",
                "inputTokenPennies": 3.0,
                "outputTokenPennies": 0,
            },
        }
    ]
    # Some clients take 5.0 for no whole number.
    raw = await get(proxy, "/.api/modelconfig/supported-models.json")
    assert '"chatTopK":5,' in raw.text
    assert models["defaultModels"] == {
        "chat": "acme::v1::large",
        "fastChat": "acme::v1::large",
        "codeCompletion": "acme::v1::large",
        "unlimitedChat": "acme::v1::large",
    }


async def test_edit_is_not_added_where_somebody_uses_the_word(start: Starter, upstream):
    block = model_configuration(upstream.url)
    plain = block["modelOverrides"][0]
    block["modelOverrides"].append(
        plain | {"modelRef": "acme::v1::small", "capabilities": ["chat", "edit"]}
    )
    proxy = await start(block)
    models = read_models(await get(proxy, "/.api/modelconfig/supported-models.json"))
    assert [model["capabilities"] for model in models["models"]] == [
        ["chat", "autocomplete"],
        ["chat", "edit"],
    ]


async def test_there_are_no_rules(proxy):
    query = "filter[applies_to_repo]=a&filter[applies_to_path]=b"
    assert (await get(proxy, f"/.api/rules?{query}")).json() == {"rules": []}


async def test_duplicate_slashes_and_head(proxy):
    raw = await get(proxy, "//.api//client-config")
    read_client_config(raw)
    raw = await request(proxy.url, "HEAD", "/.api/client-config", bearing())
    assert (raw.status, raw.body) == (200, b"")
    assert int(raw.header("content-length") or 0) > 100


async def test_usage_is_the_token_owners_own(start: Starter, upstream):
    proxy = await start(model_configuration(upstream.url), auth=AUTH)
    upstream.script(sse(*openai_chunks(["a"], usage=(7, 3))))
    for _ in range(2):
        await proxy.chat(headers=bearing())
    await proxy.code(QUESTION | {"stream": True}, headers=bearing())
    await proxy.chat({"messages": []}, headers=bearing())  # cost nothing
    await proxy.chat(headers=bearing("cp_ben"))
    ann = (await get(proxy, "/.api/usage")).json()
    assert ann["user"] == "ann"
    [day] = ann["days"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", day["date"])
    assert day["features"]["chat_completions"] == {
        "requests": 2,
        "promptTokens": 14,
        "completionTokens": 6,
    }
    assert day["features"]["code_completions"]["requests"] == 1
    ben = (await get(proxy, "/.api/usage", "cp_ben")).json()
    assert ben["days"][0]["features"]["chat_completions"]["requests"] == 1


# ------------------------------------------------------------------------------ pages


class Elements(HTMLParser):
    """The elements of a page: names, and attributes by name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def values(self, attribute: str) -> list[str | None]:
        return [attrs[attribute] for _, attrs in self.found if attribute in attrs]


def assert_harmless(raw) -> Elements:
    """Check that a page can neither load nor run anything, nor be framed or kept."""
    assert raw.header("content-type") == "text/html; charset=utf-8"
    policy = raw.header("content-security-policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "frame-ancestors 'none'" in policy and "form-action 'self'" in policy
    assert raw.header("x-content-type-options") == "nosniff"
    assert raw.header("referrer-policy") == "no-referrer"
    assert raw.header("cache-control") == "no-store"
    assert raw.header("location") is None
    elements = Elements(raw.text)
    names = {name for name, _ in elements.found}
    assert not names & {"script", "img", "link", "iframe", "base", "object"}
    assert elements.values("src") == elements.values("style") == []
    assert not [a for _, attrs in elements.found for a in attrs if a.startswith("on")]
    return elements


BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


async def test_a_browser_gets_a_page_and_everybody_else_health(
    start: Starter, upstream
):
    block = model_configuration(
        upstream.url, endpoints=[{"url": f"{upstream.url}/v1", "accessToken": "sk-1"}]
    )
    name = '<img src=x onerror="alert(1)">'
    block["modelOverrides"][0]["displayName"] = name
    proxy = await start(block, auth=AUTH)
    raw = await request(proxy.url, "GET", "/", BROWSER)
    assert raw.status == 200
    assert_harmless(raw)
    assert html.escape(name) in raw.text
    assert "acme::v1::large" in raw.text
    for secret in ("sk-1", TOKEN, "ann", upstream.url):
        assert secret not in raw.text
    assert upstream.requests == []
    upstream.script([b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"])
    for headers in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
        raw = await request(proxy.url, "GET", "/", bearing() | headers)
        assert (raw.status, raw.body) == (200, b"")
        assert upstream.last.path == "/health"


SIGN_IN = "/user/settings/tokens/new"
CALLBACK = f"{SIGN_IN}/callback"
HANDING = {"handTokenBack": True}
CALLBACKS = [
    ("CODY", "vscode://sourcegraph.cody-ai?code=cp_ann"),
    ("CODY_INSIDERS", "vscode-insiders://sourcegraph.cody-ai?code=cp_ann"),
    ("CODY_VSCODIUM", "vscodium://sourcegraph.cody-ai?code=cp_ann"),
    ("CODY_CURSOR", "cursor://sourcegraph.cody-ai?code=cp_ann"),
    ("JETBRAINS-63342", "http://localhost:63342/api/sourcegraph/token?token=cp_ann"),
    ("NEOVIM-4000", "http://localhost:4000/api/sourcegraph/token?token=cp_ann"),
    ("CODY_CLI-4001", "http://localhost:4001/api/sourcegraph/token?token=cp_ann"),
]


async def post_token(proxy: RunningProxy, requester: str, token: str):
    return await request(
        proxy.url, path=CALLBACK, body=f"requestFrom={requester}&token={token}".encode()
    )


@pytest.mark.parametrize(("requester", "link"), CALLBACKS)
async def test_signing_in_hands_the_token_back(
    start: Starter, upstream, requester, link
):
    block = model_configuration(upstream.url)
    proxy = await start(block, auth=AUTH, instance=HANDING)
    raw = await request(proxy.url, "GET", f"{CALLBACK}?requestFrom={requester}")
    elements = assert_harmless(raw)
    assert raw.status == 200
    assert elements.values("href") == []
    assert requester in elements.values("value")
    assert elements.values("action") == [CALLBACK]
    raw = await post_token(proxy, requester, TOKEN)
    assert raw.status == 200
    assert assert_harmless(raw).values("href") == [link]
    assert TOKEN not in proxy.log


async def test_signing_in_with_a_wrong_token_gives_nothing(start: Starter, upstream):
    block = model_configuration(upstream.url)
    proxy = await start(block, auth=AUTH, instance=HANDING)
    for wrong in ("", "cp_wrong", "%3Cb%3E", "%FF"):
        raw = await post_token(proxy, "CODY", wrong)
        assert raw.status == 401
        elements = assert_harmless(raw)
        assert elements.values("href") == []
        assert "not known here" in raw.text and "<b>" not in raw.text
        assert proxy.outcomes[-1]["kind"] == "unauthorized"


@pytest.mark.parametrize(
    "requester",
    [
        *("", "X", "APP", "CODY-4000", "JETBRAINS", "JETBRAINS-0", "JETBRAINS-65536"),
        *("JETBRAINS-1@evil.example", "JETBRAINS-80/../", "cody", "CODY%0AX"),
        "https://evil.example/",
        "JETBRAINS-1&port=2&redirect=https://evil.example",
    ],
)
async def test_nobody_else_is_handed_a_token(start: Starter, upstream, requester):
    block = model_configuration(upstream.url)
    proxy = await start(block, auth=AUTH, instance=HANDING)
    for raw in (
        await request(proxy.url, "GET", f"{CALLBACK}?requestFrom={requester}"),
        await post_token(proxy, requester, TOKEN),
    ):
        links = assert_harmless(raw).values("href")
        assert "evil" not in raw.text
        local = "http://localhost:1/api/sourcegraph/token?token=cp_ann"
        assert links in ([], [local])
        if "&" not in requester:
            assert links == []


@given(st.dictionaries(st.sampled_from(["requestFrom", "port"]), st.text()))
@example({"requestFrom": "JETBRAINS", "port": "80"})
@example({"requestFrom": "JETBRAINS-80", "port": "@evil"})
@example({"requestFrom": "NEOVIM", "port": "٤"})
def test_links_lead_to_editors_alone(query):
    found = callback(query)
    if found is not None:
        link = found.link("a b&c")
        assert re.fullmatch(
            r"[a-z-]+://sourcegraph\.cody-ai\?code=a%20b%26c"
            r"|http://localhost:[1-9]\d{0,4}/api/sourcegraph/token\?token=a%20b%26c",
            link,
            re.ASCII,
        )
        assert callback({"requestFrom": found.requester}) == found


async def test_by_default_the_page_only_explains(proxy):
    for path in (SIGN_IN, f"{CALLBACK}?requestFrom=CODY"):
        raw = await request(proxy.url, "GET", path)
        elements = assert_harmless(raw)
        assert raw.status == 200
        assert "auth.tokens" in raw.text
        assert not {"form", "a"} & {name for name, _ in elements.found}
    raw = await post_token(proxy, "CODY", TOKEN)
    assert TOKEN not in raw.text


async def test_an_open_proxy_hands_out_what_is_no_secret(start: Starter, upstream):
    proxy = await start(model_configuration(upstream.url))
    raw = await request(proxy.url, "GET", f"{CALLBACK}?requestFrom=CODY")
    [link] = assert_harmless(raw).values("href")
    assert link == "vscode://sourcegraph.cody-ai?code=cp_open"
    user = await ask(proxy, "CurrentUser", "cp_open")
    read_graphql(user, "CurrentUser")


# ------------------------------------------------------------------------ web clients

ORIGIN = "https://cody.example.com"
ALLOWED = "access-control-allow-origin"


async def test_a_web_page_of_a_known_origin_may_ask(start: Starter, upstream):
    upstream.script(ANSWER)
    block = model_configuration(upstream.url)
    proxy = await start(block, auth=AUTH, origins=[ORIGIN, "http://localhost:5777"])
    asks = {"Access-Control-Request-Method": "POST", "Origin": ORIGIN}
    for path in (f"{GRAPHQL}?CurrentUser", "/.api/completions/stream", "/v1/models"):
        raw = await request(proxy.url, "OPTIONS", path, asks)
        assert (raw.status, raw.header(ALLOWED)) == (204, ORIGIN)
        headers = raw.header("access-control-allow-headers") or ""
        assert headers.split(", ") == ["Authorization", "*"]
        assert "POST" in (raw.header("access-control-allow-methods") or "")
    raw = await proxy.chat(headers=bearing() | {"Origin": ORIGIN})
    assert_ends_once(raw)
    assert (raw.header(ALLOWED), raw.header("vary")) == (ORIGIN, "Origin")
    wrong = bearing("cp_wrong") | {"Origin": "http://localhost:5777"}
    raw = await request(proxy.url, "GET", "/.api/client-config", wrong)
    assert (raw.status, raw.header(ALLOWED)) == (401, "http://localhost:5777")
    raw = await request(proxy.url, "GET", "/healthz", {"Origin": ORIGIN})
    assert raw.header(ALLOWED) == ORIGIN
    assert proxy.log.count("OPTIONS") == 0


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "", ORIGIN + ".evil.example", ORIGIN + "/"],
)
async def test_a_web_page_of_any_other_may_not(start: Starter, upstream, origin):
    block = model_configuration(upstream.url)
    proxy = await start(block, auth=AUTH, origins=[ORIGIN])
    asks = {"Access-Control-Request-Method": "POST", "Origin": origin}
    raw = await request(proxy.url, "OPTIONS", f"{GRAPHQL}?CurrentUser", asks)
    assert raw.header(ALLOWED) is None
    raw = await get(proxy, "/.api/client-config", Origin=origin)
    assert (raw.status, raw.header(ALLOWED)) == (200, None)


async def test_by_default_no_web_page_may_ask(proxy):
    asks = {"Access-Control-Request-Method": "POST", "Origin": ORIGIN}
    raw = await request(proxy.url, "OPTIONS", f"{GRAPHQL}?CurrentUser", asks)
    assert (raw.status, raw.header(ALLOWED)) == (405, None)


@pytest.mark.parametrize(
    "origin",
    ["*", "cody.example.com", f"{ORIGIN}/", "https://a b", "https://é", "file://"],
)
def test_what_is_no_origin(origin):
    block = model_configuration("http://up")
    with pytest.raises(
        ConfigError, match=r"origins\[0\]: expected the origin of a web"
    ):
        load({"modelConfiguration": block, "origins": [origin]})


# -------------------------------------------------------------- the client's own part


async def test_the_preamble_of_the_client_is_lifted_where_wanted(
    start: Starter, upstream
):
    upstream.script(ANSWER)
    models = {"acme::v1::large": {"liftPreamble": True}}
    proxy = await start(model_configuration(upstream.url), auth=AUTH, models=models)
    await CommandLine(proxy.url, TOKEN).chat("hi")
    assert upstream.last.json()["messages"] == [
        {"role": "system", "content": PREAMBLE},
        {"role": "user", "content": "hi"},
    ]
    proxy = await start(model_configuration(upstream.url), auth=AUTH)
    await CommandLine(proxy.url, TOKEN).chat("hi")
    assert upstream.last.json()["messages"][:2] == [
        {"role": "user", "content": PREAMBLE},
        {"role": "assistant", "content": PREAMBLE_REPLY},
    ]


@pytest.mark.parametrize(
    "wrong", [{}, {"a": {}}, {"a": [{}]}, {"a": [{"b": "1"}]}, {"a": [{"b": True}]}]
)
def test_shapes_are_looked_at_closely(wrong):
    check({"a": [{"b": 1}], "c": None}, {"a": [{"b": int}]})
    with pytest.raises(AssertionError):
        check(wrong, {"a": [{"b": int}]})


def test_settings_are_a_text_to_clients():
    with pytest.raises(AssertionError):
        check({"viewerSettings": {"final": {}}}, OPERATIONS["ViewerSettings"])
