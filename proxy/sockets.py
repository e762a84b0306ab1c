"""Listening sockets."""

import errno
import os
import socket
from collections.abc import Iterable
from typing import Any

BACKLOG = 1024
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def listen(
    addresses: Iterable[tuple[str, int]], *, share: bool = False
) -> list[socket.socket]:
    """Listen on all addresses, or on none.

    A host name may have several addresses; port 0 takes any free port.

    Args:   share: let ``beside`` open further sockets on the same ports.
    Raises: OSError: one of them cannot be had; says which, and why.
    """
    sockets: list[socket.socket] = []
    for host, port in addresses:
        try:
            sockets += _listen(host, port, share)
        except OSError as error:
            close(sockets)
            number = error.errno or 0
            reason = os.strerror(number).lower() if number > 0 else str(error)
            text = f"cannot listen on {host}:{port}: {reason}"
            raise OSError(number, text) from error
    return sockets


def beside(others: Iterable[socket.socket]) -> list[socket.socket]:
    """Listen once more on the ports of sockets that share theirs.

    The kernel spreads connections over all by a hash of their addresses. Raises: OSError.
    """
    sockets: list[socket.socket] = []
    for each in others:
        try:
            sockets.append(
                _bound(each.family, each.type, each.proto, each.getsockname(), True)
            )
        except OSError:
            close(sockets)
            raise
    return sockets


def close(sockets: Iterable[socket.socket]) -> None:
    for each in sockets:
        each.close()


def _listen(host: str, port: int, share: bool) -> list[socket.socket]:
    infos = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    found: list[socket.socket] = []
    missing: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(infos):
        try:
            if share:
                # Else nobody would notice another proxy on the same port.
                _bound(family, kind, protocol, address, False).close()
            # The protocol is named: asyncio looks there whether to set TCP_NODELAY.
            found.append(_bound(family, kind, protocol, address, share))
        except OSError as error:
            # "localhost" is often an address that the machine has not got, too.
            if error.errno not in _NO_SUCH_ADDRESS:
                close(found)
                raise
            missing = error
    if missing is not None and not found:
        raise missing
    return found


def _bound(
    family: int, kind: int, protocol: int, address: Any, share: bool
) -> socket.socket:
    raw = socket.socket(family, kind, protocol)
    try:
        raw.setblocking(False)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        raw.bind(address)
        raw.listen(BACKLOG)
    except OSError:
        raw.close()
        raise
    return raw
