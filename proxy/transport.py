"""What the configuration says about connections: their TLS, and the way out."""

from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from proxy import tls
from proxy.egress import Egress, from_environment
from proxy.modelconfig.findings import Findings
from proxy.modelconfig.resolved import Provider
from proxy.modelconfig.schema import Keys
from proxy.tls import BadFile, ServerTls, UpstreamTls


class ServerFiles(Keys):
    """``tls``: names of PEM files, relative to the configuration's."""

    certificate: str
    key: str


class UpstreamFiles(Keys):
    """``providers.….tls``."""

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    insecure_skip_verify: bool = False


def server(
    given: ServerFiles | None, directory: Path, findings: Findings
) -> ServerTls | None:
    """Return how clients are spoken to, None for plain HTTP."""
    if given is None:
        return None
    found = ServerTls(str(directory / given.certificate), str(directory / given.key))
    _check_pair(found, "tls", findings)
    return found


def upstream(
    provider: Provider,
    given: UpstreamFiles | None,
    use_environment_proxy: bool,
    directory: Path,
    environ: Mapping[str, str],
    findings: Findings,
) -> Provider:
    """Return the provider with its own ways of being connected to."""
    at = f"providers.{provider.id}"
    if use_environment_proxy:
        provider = replace(provider, egress=_egress(environ, at, findings))
    if given is not None:
        found = _upstream_tls(given, directory, f"{at}.tls", findings)
        provider = replace(provider, tls=found)
        urls = [endpoint.url for endpoint in provider.endpoints]
        if urls and all(url.startswith("http://") for url in urls):
            findings.warn(f"{at}.tls", "has no effect: its endpoints are http://")
    return provider


def _egress(environ: Mapping[str, str], at: str, findings: Findings) -> Egress | None:
    at = f"{at}.useEnvironmentProxy"
    egress, problems = from_environment(environ)
    for text in problems:
        findings.problem(at, text)
    if not egress.http and not egress.https:
        findings.warn(at, "HTTPS_PROXY and HTTP_PROXY are not set in the environment")
        return None
    return egress


def _upstream_tls(
    given: UpstreamFiles, directory: Path, at: str, findings: Findings
) -> UpstreamTls:
    if bool(given.certificate) != bool(given.key):
        findings.problem(at, "give certificate and key, or neither")
        return UpstreamTls()
    if given.insecure_skip_verify:
        text = "whoever is on the way to this provider can read and change what is sent"
        findings.warn(f"{at}.insecureSkipVerify", f"certificates go unchecked: {text}")
        if given.ca:
            findings.problem(at, "give ca or insecureSkipVerify, not both")
    names = (given.ca, given.certificate, given.key)
    ca, certificate, key = (str(directory / name) if name else "" for name in names)
    found = UpstreamTls(ca, certificate, key, not given.insecure_skip_verify)
    try:
        tls.upstream_context(replace(found, certificate="", key=""))
    except BadFile as bad:
        findings.problem(f"{at}.{bad.key}", str(bad))
    if certificate:
        _check_pair(found, at, findings)
    return found


def _check_pair(pair: ServerTls | UpstreamTls, at: str, findings: Findings) -> None:
    try:
        if why := tls.dates(pair.certificate, pair.key):
            findings.warn(f"{at}.certificate", why)
    except BadFile as bad:
        findings.problem(f"{at}.{bad.key}", str(bad))
