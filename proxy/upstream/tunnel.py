"""A connection through an HTTP proxy: CONNECT, and then it is as if it were not there.

For plain HTTP as well: the proxy sees where to, and nothing of what is said.
"""

import asyncio
import socket

MAX_HEAD_BYTES = 16 * 1024


class TunnelFailed(ConnectionError):
    """The HTTP proxy cannot be reached, or does not let us through; says which."""


async def open_tunnel(raw: socket.socket, host: str, port: int, basic: str) -> None:
    """Ask the proxy at the other end of ``raw`` for a connection to an upstream.

    Args:   basic: credentials for the proxy, in Base64; "" for none.
    Raises: TunnelFailed. OSError.
    """
    loop = asyncio.get_running_loop()
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
    if basic:
        lines.append(f"Proxy-Authorization: Basic {basic}")
    head = "\r\n".join(lines) + "\r\n\r\n"
    await loop.sock_sendall(raw, head.encode("ascii"))
    reply = b""
    while b"\r\n\r\n" not in reply:
        data = await loop.sock_recv(raw, MAX_HEAD_BYTES)
        if not data:
            raise TunnelFailed("closed the connection")
        reply += data
        if len(reply) > MAX_HEAD_BYTES:
            raise TunnelFailed("sent a head that is too long")
    version, _, rest = reply.partition(b" ")
    if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
        raise TunnelFailed("sent something that is not HTTP")
    if not rest.startswith(b"2"):
        raise TunnelFailed(f"refused the connection with status {rest[:3].decode()}")
    if not reply.endswith(b"\r\n\r\n"):
        # The upstream waits for us to begin, so this is not from there.
        raise TunnelFailed("sent something before it was asked")
