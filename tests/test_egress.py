"""The way out through an HTTP proxy: which one, and over real sockets."""

from base64 import b64encode
from pathlib import Path

import pytest
import yaml

from proxy import config
from proxy.egress import from_environment
from proxy.errors import ConfigError
from tests.support.certificates import Authority
from tests.support.client import request
from tests.support.cody import read_chat
from tests.support.connect_proxy import ConnectProxy
from tests.support.fixtures import QUESTION, model_configuration, running
from tests.support.process import serve
from tests.support.upstream import ScriptedUpstream, openai_chunks, sse
from tests.test_tls import TlsUpstream, server_context

ANSWER = sse(*openai_chunks(["Hi"]))
PROXIES = {"HTTPS_PROXY": "http://s:1", "HTTP_PROXY": "http://p:2"}


@pytest.mark.parametrize(
    ("environ", "scheme", "url"),
    [
        ({}, "https", ""),
        (PROXIES, "https", "http://s:1"),
        (PROXIES, "http", "http://p:2"),
        (PROXIES | {"https_proxy": "small:3"}, "https", "http://small:3"),
        ({"ALL_PROXY": "http://a:4"}, "http", "http://a:4"),
        ({"ALL_PROXY": "http://a:4"}, "https", "http://a:4"),
        (PROXIES | {"https_proxy": ""}, "https", "http://s:1"),
    ],
)
def test_which_proxy(environ, scheme, url):
    egress, problems = from_environment(environ)
    assert (egress.proxy_for(scheme, "example.com", 443), problems) == (url, [])


@pytest.mark.parametrize(
    ("rules", "host", "is_direct"),
    [
        ("*", "example.com", True),
        ("example.com", "example.com", True),
        ("example.com", "api.EXAMPLE.com", True),
        ("example.com", "badexample.com", False),
        (".example.com", "api.example.com", True),
        ("*.example.com", "api.example.com", True),
        ("a.b, example.com", "example.com", True),
        ("example.com:443", "example.com", True),
        ("example.com:80", "example.com", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("127.0.0.1", "127.0.0.1", True),
        ("::1", "::1", True),
        ("[::1]", "::1", True),
        ("[::1]:443", "::1", True),
        ("", "example.com", False),
        (".", "example.com", False),
    ],
)
def test_who_is_asked_directly(rules, host, is_direct):
    egress, _ = from_environment(PROXIES | {"NO_PROXY": rules})
    assert (egress.proxy_for("https", host, 443) == "") is is_direct


@pytest.mark.parametrize(
    "url", ["https://p:1", "socks5://p:1", "http://", "http://p:x", "http://p:0"]
)
def test_a_proxy_that_cannot_be_used_is_a_problem_that_hides_its_password(url):
    url = url.replace("//", "//ann:secret-1@")
    with pytest.raises(ConfigError) as caught:
        settings_of("http://127.0.0.1:1", {"HTTPS_PROXY": url})
    (problem,) = caught.value.problems
    assert problem == (
        "providers.acme.useEnvironmentProxy: HTTPS_PROXY in the environment: "
        'expected "http://host:port"'
    )


def settings_of(url: str, environ: dict[str, str], **own: object) -> config.Settings:
    file = {
        "listen": "127.0.0.1:0",
        "modelConfiguration": model_configuration(url),
        "providers": {"acme": {"useEnvironmentProxy": True, **own}},
    }
    return config.load(yaml.safe_dump(file), environ=environ, directory=Path())


def test_no_proxy_in_the_environment_is_warned_of():
    settings = settings_of("http://127.0.0.1:1", {})
    assert "HTTPS_PROXY and HTTP_PROXY are not set" in "".join(settings.warnings)
    assert settings.models.providers["acme"].egress is None


def test_passwords_of_proxies_are_secrets():
    settings = settings_of("http://x", {"HTTP_PROXY": "http://ann:se%20cret@p:1"})
    assert {"se%20cret", "se cret"} <= set(config.secrets(settings))
    assert "cret" not in repr(settings) and "cret" not in config.describe(settings)


async def ask(url: str, proxy: ConnectProxy, userinfo: str = "", **own: object):
    at = f"http://{userinfo}{proxy.address}"
    settings = settings_of(url, {"HTTP_PROXY": at, "HTTPS_PROXY": at}, **own)
    async with running(settings) as ours:
        outcomes = [read_chat(await ours.chat(), 2) for _ in range(2)]
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


async def test_plain_http_goes_through_a_tunnel(upstream: ScriptedUpstream):
    upstream.script(ANSWER)
    async with ConnectProxy(to=upstream.port) as proxy:
        outcome = await ask("http://upstream.example.com:81", proxy, "ann:p%40ss@")
    assert outcome.text == "Hi"
    basic = b64encode(b"ann:p@ss").decode()
    place = "upstream.example.com:81"  # whose name only the proxy looks up
    assert proxy.heads == [
        f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n"
        f"Proxy-Authorization: Basic {basic}\r\n\r\n"
    ]
    assert b"Proxy-Authorization" not in proxy.through
    assert upstream.last.header("host") == place


async def test_tls_goes_through_a_tunnel(tmp_path, upstream: ScriptedUpstream):
    upstream.script(ANSWER)
    authority = Authority(tmp_path)
    pair = authority.issue("server", "upstream.example.com")
    there = TlsUpstream(upstream, server_context(pair))
    async with there.running() as url:
        port = int(url.rpartition(":")[2])
        async with ConnectProxy(to=port) as proxy:
            tls = {"ca": str(authority.ca)}
            outcome = await ask("https://upstream.example.com", proxy, tls=tls)
    assert outcome.text == "Hi"
    assert proxy.heads == [
        "CONNECT upstream.example.com:443 HTTP/1.1\r\n"
        "Host: upstream.example.com:443\r\n\r\n"
    ]
    assert b"What is your name" not in proxy.through


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (
            b"HTTP/1.1 407 Authenticate\r\nContent-Length: 0\r\n\r\n",
            "refused the connection with status 407",
        ),
        (b"SSH-2.0-x\r\n\r\n", "sent something that is not HTTP"),
        (b"HTTP/1.1 200 OK\r\n", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200", "sent something before it was asked"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000, "sent a head that is too long"),
    ],
)
async def test_a_tunnel_that_does_not_open(answer, why):
    async with ConnectProxy(answer=answer) as proxy:
        outcome = await ask("http://upstream.example.com/v1", proxy)
    assert outcome.errors[0].endswith(
        f"upstream upstream.example.com: the HTTP proxy on the way {why}"
    )
    assert outcome.text == ""


async def test_a_proxy_that_is_not_there():
    async with ConnectProxy() as proxy:
        pass
    outcome = await ask("http://upstream.example.com/v1", proxy)
    assert outcome.errors[0].endswith("the HTTP proxy on the way cannot be reached")


async def test_an_upstream_behind_no_proxy_is_asked_directly(upstream):
    upstream.script(ANSWER)
    async with ConnectProxy(to=upstream.port) as proxy:
        environ = {"HTTP_PROXY": f"http://{proxy.address}", "NO_PROXY": "127.0.0.0/8"}
        async with running(settings_of(upstream.url, environ)) as ours:
            assert read_chat(await ours.chat(), 2).text == "Hi"
    assert proxy.heads == []


async def test_serve_goes_through_a_tunnel(tmp_path, upstream: ScriptedUpstream):
    upstream.script(ANSWER)
    authority = Authority(tmp_path)
    there = TlsUpstream(
        upstream, server_context(authority.issue("server", "upstream.example.com"))
    )
    file = tmp_path / "proxy.yaml"
    own = {"tls": {"ca": "ca.pem"}, "useEnvironmentProxy": True}
    block = model_configuration("https://upstream.example.com")
    file.write_text(
        yaml.safe_dump({"modelConfiguration": block, "providers": {"acme": own}})
    )
    async with there.running() as url:
        port = int(url.rpartition(":")[2])
        async with (
            ConnectProxy(to=port) as proxy,
            serve("--config", str(file), HTTPS_PROXY=proxy.address) as ours,
        ):
            raw = await request(
                ours.url, path="/.api/completions/stream?api-version=2", body=QUESTION
            )
    assert read_chat(raw, 2).text == "Hi"


async def test_the_environment_is_not_looked_at_unasked(upstream, monkeypatch):
    upstream.script(ANSWER)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    environ = {"HTTP_PROXY": "http://127.0.0.1:1"}
    settings = settings_of(upstream.url, environ, useEnvironmentProxy=False)
    async with running(settings) as ours:
        assert read_chat(await ours.chat(), 2).text == "Hi"
