"""TLS as files: the contexts that they make, and what is wrong with them in words."""

import datetime
import ssl
from collections.abc import Iterator

import msgspec

SOON_DAYS = 14
_EXPIRED, _NOT_YET_VALID = 10, 9
_HOST_MISMATCH, _ADDRESS_MISMATCH = 62, 64
_WHY = {
    _EXPIRED: "it has expired",
    _NOT_YET_VALID: "it is not valid yet",
    18: "it is signed by itself",
    19: "its chain ends in an unknown authority",
    20: "its issuer is unknown",
    21: "its issuer is unknown",
    _HOST_MISMATCH: "it is for another host name",
    _ADDRESS_MISMATCH: "it is for another address",
}


class ServerTls(msgspec.Struct, frozen=True):
    """What clients are shown: names of PEM files, the certificate's with its chain."""

    certificate: str
    key: str


class UpstreamTls(msgspec.Struct, frozen=True):
    """How upstreams are verified, and what they are shown; names of PEM files or "".

    ``ca`` replaces the system's authorities.
    """

    ca: str = ""
    certificate: str = ""
    key: str = ""
    verify: bool = True


class BadFile(Exception):
    """``key`` is the setting whose file cannot be used."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


def server_context(tls: ServerTls) -> ssl.SSLContext:
    """Raises: BadFile."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    load_pair(context, tls.certificate, tls.key)
    return context


def renew(context: ssl.SSLContext, tls: ServerTls) -> None:
    """Show other files from now on; connections that are open live on.

    Raises: BadFile: nothing has changed.
    """
    # A pair that does not fit would leave the context with half of it.
    server_context(tls)
    load_pair(context, tls.certificate, tls.key)


def upstream_context(tls: UpstreamTls | None) -> ssl.SSLContext:
    """Raises: BadFile."""
    if tls is None:
        return ssl.create_default_context()
    if tls.ca:
        _check_readable("ca", tls.ca)
    try:
        context = ssl.create_default_context(cafile=tls.ca or None)
    except ssl.SSLError:
        raise BadFile("ca", "holds no PEM certificate") from None
    if tls.ca:
        # Python 3.13 began to ask for extensions that many private authorities leave out.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if tls.certificate:
        load_pair(context, tls.certificate, tls.key)
    return context


def load_pair(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """Raises: BadFile."""
    _check_readable("certificate", certificate)
    _check_readable("key", key)
    try:
        context.load_cert_chain(certificate, key, _no_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            text = "is not the key of the certificate"
            raise BadFile("key", text) from None
        raise _culprit(certificate) from None


def _check_readable(key: str, name: str) -> None:
    try:
        with open(name, "rb"):
            pass
    except OSError as error:
        reason = (error.strerror or "").lower()
        raise BadFile(key, f"cannot read the file: {reason}") from None


def _no_passphrase() -> str:
    # OpenSSL would ask for it at the terminal.
    raise BadFile("key", "is encrypted; expected a key without a passphrase")


def _culprit(certificate: str) -> BadFile:
    """OpenSSL does not say which of two files it cannot read."""
    try:
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trust.load_verify_locations(certificate)
    except ssl.SSLError:
        return BadFile("certificate", "holds no PEM certificate")
    return BadFile("key", "holds no PEM private key, or one of another kind")


def dates(certificate: str, key: str) -> str:
    """Return what is wrong with the dates of a certificate, "" if nothing.

    Raises: BadFile.
    """
    # Nothing in the standard library reads a certificate but a handshake.
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_pair(server, certificate, key)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(certificate)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        end = _handshake(client, server)
    except ssl.SSLCertVerificationError as error:
        is_dated = error.verify_code in (_EXPIRED, _NOT_YET_VALID)
        return _WHY[error.verify_code] if is_dated else ""
    left = end - datetime.datetime.now(datetime.UTC)
    if left.days >= SOON_DAYS:
        return ""
    return f"it expires in {left.days} days, at {end:%Y-%m-%d %H:%M} UTC"


def _handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> datetime.datetime:
    """Let the two speak in memory; return when the server's certificate expires."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server)
    answering = server.wrap_bio(to_server, to_client, server_side=True)
    for side in (asking, answering, asking):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    shown = asking.getpeercert() or {}
    end_s = ssl.cert_time_to_seconds(str(shown["notAfter"]))
    return datetime.datetime.fromtimestamp(end_s, datetime.UTC)


def distrust(error: ssl.SSLCertVerificationError) -> str:
    """Why a certificate was not accepted."""
    why = _WHY.get(error.verify_code)
    return f"its certificate is not trusted{f': {why}' if why else ''}"


def files(tls: ServerTls | UpstreamTls | None) -> Iterator[str]:
    """The names of the files that the settings are made of."""
    if tls is not None:
        names = (getattr(tls, "ca", ""), tls.certificate, tls.key)
        yield from filter(None, names)
