"""Certificates for tests, made by the ``openssl`` command: an authority and its leaves."""

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """Names of PEM files."""

    certificate: Path
    key: Path


class Authority:
    """Makes certificates in a directory. ``ca`` is the file to trust."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self._own = self._pair(name)
        self.ca = self._own.certificate
        openssl("req", "-x509", *self._new_key(self._own), "-subj", f"/CN=test {name}")

    def issue(
        self, name: str, *names: str, days: tuple[str, str] | None = None
    ) -> Pair:
        """Return a new certificate for host names and addresses, 127.0.0.1 if none.

        Args: days: from and until when, as in ``("20200101000000Z", "2021…")``.
        """
        pair, request = self._pair(name), self._directory / f"{name}.csr"
        extensions = self._directory / f"{name}.cnf"
        shown = [f"IP:{x}" if x[0].isdigit() else f"DNS:{x}" for x in names]
        extensions.write_text(f"subjectAltName={','.join(shown or ['IP:127.0.0.1'])}\n")
        openssl(
            *("req", *self._new_key(pair, request), "-subj", f"/CN={name}"),
        )
        if days is None:
            openssl(
                *("x509", "-req", "-in", request, "-out", pair.certificate),
                *("-CA", self.ca, "-CAkey", self._own.key, "-days", "365"),
                *("-extfile", extensions),
            )
        else:
            self._issue_dated(request, pair, extensions, days)
        return pair

    def _issue_dated(
        self, request: Path, pair: Pair, extensions: Path, days: tuple[str, str]
    ) -> None:
        # Only this command of openssl 3.0 takes dates.
        database = self._directory / "database"
        database.write_text("")
        config = self._directory / "ca.cnf"
        config.write_text(
            "[ca]\ndefault_ca=own\n[own]\npolicy=any\nunique_subject=no\n"
            f"default_md=sha256\nrand_serial=yes\ndatabase={database}\n"
            f"new_certs_dir={self._directory}\n[any]\ncommonName=supplied\n"
        )
        openssl(
            *("ca", "-batch", "-notext", "-config", config, "-extfile", extensions),
            *("-in", request, "-out", pair.certificate),
            *("-cert", self.ca, "-keyfile", self._own.key),
            *("-startdate", days[0], "-enddate", days[1]),
        )

    def _pair(self, name: str) -> Pair:
        return Pair(self._directory / f"{name}.pem", self._directory / f"{name}.key")

    def _new_key(self, pair: Pair, out: Path | None = None) -> tuple[object, ...]:
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
        return (*curve, "-nodes", "-keyout", pair.key, "-out", out or pair.certificate)


def openssl(*arguments: object) -> None:
    done = subprocess.run(
        ["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
