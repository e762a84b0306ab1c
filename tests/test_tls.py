"""TLS towards clients and upstreams, with certificates made here, over real sockets."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from proxy import config
from proxy.errors import ConfigError
from tests.support.certificates import Authority, Pair, openssl
from tests.support.client import build_request
from tests.support.cody import read_chat
from tests.support.fixtures import model_configuration, running
from tests.support.process import serve
from tests.support.upstream import ScriptedUpstream, openai_chunks, sse

LONG_AGO = ("20200101000000Z", "20210101000000Z")
ANSWER = sse(*openai_chunks(["Hi"]))


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def pair(authority) -> Pair:
    return authority.issue("server")


@pytest.fixture(scope="module")
def expired(authority) -> Pair:
    return authority.issue("expired", days=LONG_AGO)


def settings_of(directory: Path, file: dict, **environ: str) -> config.Settings:
    text = yaml.safe_dump({"listen": "127.0.0.1:0", **file})
    return config.load(text, environ=environ, directory=directory)


def pem(pair: Pair) -> dict[str, str]:
    return {"certificate": str(pair.certificate), "key": str(pair.key)}


def problems_of(directory: Path, file: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        settings_of(directory, file)
    return caught.value.problems


class TlsUpstream:
    """A scripted upstream behind TLS; ``certificates`` are what clients showed."""

    def __init__(self, plain: ScriptedUpstream, context: ssl.SSLContext) -> None:
        self._plain = plain
        self._context = context
        self.connections = 0
        self.certificates: list[object] = []

    async def _serve(self, reader, writer):
        self.connections += 1
        self.certificates.append(writer.get_extra_info("peercert"))
        there, out = await asyncio.open_connection("127.0.0.1", self._plain.port)
        with contextlib.closing(writer), contextlib.closing(out):
            back = asyncio.create_task(_copy(there, writer))
            with contextlib.suppress(OSError, ssl.SSLError):
                await _copy(reader, out)
            back.cancel()
            await asyncio.gather(back, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        tasks: set[asyncio.Task] = set()

        def accept(reader, writer):
            task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
            tasks.add(task)

        server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=self._context)
        try:
            yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await server.wait_closed()


async def _copy(source, target):
    while data := await source.read(65536):
        target.write(data)
        await target.drain()


def server_context(pair: Pair, client_ca: Path | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    if client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(client_ca)
    return context


# -------------------------------------------------------------------------------- clients


class TlsClient:
    """One connection whose certificate can be looked at."""

    def __init__(self, reader, writer, url: str) -> None:
        self._reader, self._writer, self._url = reader, writer, url

    @property
    def serial(self) -> str:
        return self._writer.get_extra_info("peercert")["serialNumber"]

    async def health(self) -> bytes:
        check = build_request(self._url, "GET", "/healthz", (), None, False)
        self._writer.write(check)
        async with asyncio.timeout(5):
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length: ")[2].split()[0]
            await self._reader.readexactly(int(length))
        return head.split()[1]


@contextlib.asynccontextmanager
async def connected(url: str, ca: Path) -> AsyncIterator[TlsClient]:
    context = ssl.create_default_context(cafile=ca)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # the authority is a plain one
    context.set_alpn_protocols(["http/1.1"])
    port = int(url.rpartition(":")[2])
    streams = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    assert streams[1].get_extra_info("ssl_object").selected_alpn_protocol()
    try:
        yield TlsClient(*streams, url)
    finally:
        streams[1].transport.abort()


async def test_clients_are_served_over_tls(tmp_path, authority, pair, upstream):
    upstream.script(ANSWER)
    block = {"modelConfiguration": model_configuration(upstream.url)}
    settings = settings_of(Path(), block | {"tls": pem(pair)})
    async with running(settings) as proxy:
        async with connected(proxy.url, authority.ca) as client:
            assert await client.health() == b"200"
        with pytest.raises(ssl.SSLCertVerificationError):
            async with connected(proxy.url, Authority(tmp_path, "other").ca):
                pass


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_certificates_are_renewed_without_a_restart(
    tmp_path, authority, upstream, workers
):
    upstream.script(ANSWER)
    old, new = authority.issue("old"), authority.issue("new")
    certificate, key = tmp_path / "tls.pem", tmp_path / "tls.key"

    def install(pair: Pair) -> None:
        certificate.write_bytes(pair.certificate.read_bytes())
        key.write_bytes(pair.key.read_bytes())

    install(old)
    file = tmp_path / "proxy.yaml"
    names = {"certificate": "tls.pem", "key": "tls.key"}
    block = model_configuration(upstream.url)
    file.write_text(yaml.safe_dump({"modelConfiguration": block, "tls": names}))
    async with serve("--config", str(file), "--workers", workers) as proxy:
        assert proxy.url.startswith("https://")
        async with connected(proxy.url, authority.ca) as first:
            assert await first.health() == b"200"
            if workers == "1":
                key.write_bytes(new.key.read_bytes())
                await proxy.says("  - tls.key: is not the key of the certificate\n")
                async with connected(proxy.url, authority.ca) as second:
                    assert second.serial == first.serial
            install(new)
            await proxy.says("was read again")
            await asyncio.sleep(0.1 if workers == "2" else 0)
            async with connected(proxy.url, authority.ca) as third:
                assert third.serial != first.serial
                assert await third.health() == b"200"
            assert await first.health() == b"200"  # it lives on
        assert (await proxy.stop())[0] == 0


def test_problems_with_certificates_are_listed_with_the_others(
    tmp_path, authority, pair
):
    other = authority.issue("other")
    encrypted = tmp_path / "encrypted.key"
    aes = ("-aes256", "-passout", "pass:secret-1")
    openssl("pkey", "-in", pair.key, "-out", encrypted, *aes)
    (tmp_path / "empty").write_text("")
    (tmp_path / "proxy.yaml").write_text("")
    block = {"modelConfiguration": model_configuration("http://127.0.0.1:1")}
    good, key = str(pair.certificate), str(pair.key)

    def said(certificate: str, key: str) -> list[str]:
        tls = {"certificate": certificate, "key": key}
        return problems_of(tmp_path, block | {"tls": tls, "aliases": {"a": "b"}})

    alias = 'aliases.a: unknown model "b"; known: acme::v1::large'
    missing = "cannot read the file: no such file or directory"
    assert said("none", key) == [f"tls.certificate: {missing}", alias]
    assert said(good, "none") == [f"tls.key: {missing}", alias]
    assert said(good, str(other.key))[0] == "tls.key: is not the key of the certificate"
    assert said("empty", key)[0] == "tls.certificate: holds no PEM certificate"
    assert said(good, "empty")[0] == (
        "tls.key: holds no PEM private key, or one of another kind"
    )
    assert said(good, str(encrypted))[0] == (
        "tls.key: is encrypted; expected a key without a passphrase"
    )


def test_dates_are_warned_of(tmp_path, authority, expired):
    block = {"modelConfiguration": model_configuration("http://127.0.0.1:1")}

    def warnings(pair: Pair) -> list[str]:
        settings = settings_of(tmp_path, block | {"tls": pem(pair)})
        return [text for text in settings.warnings if text.startswith("tls")]

    assert warnings(expired) == ["tls.certificate: it has expired"]
    late = authority.issue("late", days=("20400101000000Z", "20410101000000Z"))
    assert warnings(late) == ["tls.certificate: it is not valid yet"]
    assert warnings(authority.issue("good")) == []


# ------------------------------------------------------------------------------ upstreams


async def ask(upstream: TlsUpstream, url: str, tls: dict, **own: object) -> str:
    """Return what a client sees of an upstream behind TLS."""
    block = model_configuration(url)
    file = {
        "modelConfiguration": block,
        "providers": {"acme": {"tls": tls, **own} if tls else own},
    }
    async with running(settings_of(Path(), file)) as proxy:
        outcome = read_chat(await proxy.chat(), 2)
        again = read_chat(await proxy.chat(), 2)
    assert outcome == again
    (said,) = [outcome.text] if outcome.text else outcome.errors
    return said


async def test_upstream_is_trusted_by_its_authority(authority, pair, upstream):
    upstream.script(ANSWER)
    there = TlsUpstream(upstream, server_context(pair))
    async with there.running() as url:
        assert await ask(there, url, {"ca": str(authority.ca)}) == "Hi"
    assert there.connections == 1  # and kept alive


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("wrong ca", ": its issuer is unknown"),
        ("wrong name", ": it is for another address"),
        ("expired", ": it has expired"),
        ("no ca", ": its issuer is unknown"),
    ],
)
async def test_upstream_is_not_trusted(
    tmp_path, authority, pair, expired, upstream, case, why
):
    shown = {"expired": expired, "wrong name": authority.issue("x", "example.com")}
    ca = Authority(tmp_path, "other").ca if case == "wrong ca" else authority.ca
    there = TlsUpstream(upstream, server_context(shown.get(case, pair)))
    async with there.running() as url:
        said = await ask(there, url, {} if case == "no ca" else {"ca": str(ca)})
    assert said.endswith(f"its certificate is not trusted{why}")
    assert upstream.requests == []


async def test_upstream_goes_unverified_only_by_name(expired, upstream):
    upstream.script(ANSWER)
    there = TlsUpstream(upstream, server_context(expired))
    async with there.running() as url:
        assert await ask(there, url, {"insecureSkipVerify": True}) == "Hi"


async def test_upstream_is_shown_a_client_certificate(authority, pair, upstream):
    upstream.script(ANSWER)
    client = authority.issue("client", "client.example.com")
    there = TlsUpstream(upstream, server_context(pair, authority.ca))
    ca = {"ca": str(authority.ca)}
    async with there.running() as url:
        assert await ask(there, url, ca | pem(client)) == "Hi"
        assert "client.example.com" in str(there.certificates[0])
        said = await ask(there, url, ca)
    assert said.partition(": ")[2] in (
        "TLS handshake failed",
        "connection closed before a reply",
    )


async def test_connections_are_kept_apart_by_tls(authority, pair, upstream):
    """What a provider does not trust must not reach it over another's connection."""
    upstream.script(ANSWER)
    there = TlsUpstream(upstream, server_context(pair))
    async with there.running() as url:
        block = model_configuration(url)
        (provider,), (model,) = block["providerOverrides"], block["modelOverrides"]
        block["providerOverrides"].append(provider | {"id": "strict"})
        block["modelOverrides"].append(model | {"modelRef": "strict::v1::other"})
        tls = {"ca": str(authority.ca)}
        file = {"modelConfiguration": block, "providers": {"acme": {"tls": tls}}}
        async with running(settings_of(Path(), file)) as proxy:
            for _ in range(2):
                trusting = read_chat(await proxy.chat(), 2)
                strict = read_chat(
                    await proxy.chat(
                        {
                            "model": "strict::v1::other",
                            "messages": [{"speaker": "human", "text": "hi"}],
                        }
                    ),
                    2,
                )
                assert trusting.text == "Hi"
                assert "not trusted" in strict.errors[0]


def test_upstream_settings_are_checked(tmp_path, authority, pair):
    block = model_configuration("https://127.0.0.1:1")

    def file(**tls: object) -> dict:
        return {"modelConfiguration": block, "providers": {"acme": {"tls": tls}}}

    at = "providers.acme.tls"
    ca = str(authority.ca)
    assert problems_of(tmp_path, file(ca="none", certificate="x", key="y")) == [
        f"{at}.ca: cannot read the file: no such file or directory",
        f"{at}.certificate: cannot read the file: no such file or directory",
    ]
    assert problems_of(tmp_path, file(certificate="x")) == [
        f"{at}: give certificate and key, or neither"
    ]
    assert problems_of(tmp_path, file(ca=ca, insecureSkipVerify=True)) == [
        f"{at}: give ca or insecureSkipVerify, not both"
    ]
    assert problems_of(tmp_path, file(ca=str(pair.key))) == [
        f"{at}.ca: holds no PEM certificate"
    ]
    settings = settings_of(tmp_path, file(insecureSkipVerify=True))
    (warning,) = [text for text in settings.warnings if text.startswith(at)]
    assert warning.startswith(f"{at}.insecureSkipVerify: certificates go unchecked: ")
    assert warning in config.describe(settings)
    assert settings_of(tmp_path, file(ca=ca)).files == (ca,)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1", "TLSv1_2"])
async def test_clients_speak_tls_1_2_at_least(tmp_path, authority, pair, version):
    file = {"tls": pem(pair), "modelConfiguration": model_configuration("http://x")}
    context = ssl.create_default_context(cafile=str(authority.ca))
    context.set_ciphers("DEFAULT@SECLEVEL=0")  # the client would
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion[version]
    async with running(settings_of(tmp_path, file)) as proxy:
        port = int(proxy.url.rpartition(":")[2])
        opening = asyncio.open_connection("127.0.0.1", port, ssl=context)
        if version == "TLSv1_2":
            _, writer = await opening
            writer.close()
        else:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await opening


async def test_handshake_that_does_not_come(tmp_path, pair, monkeypatch):
    monkeypatch.setattr("proxy.listener._HANDSHAKE_S", 0.2)
    file = {"tls": pem(pair), "modelConfiguration": model_configuration("http://x")}
    async with running(settings_of(tmp_path, file)) as proxy:
        port = int(proxy.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 2) == b""
        writer.close()
