"""Asks a gateway of this machine whether it can answer, without an HTTP library."""

import asyncio
import ssl

PROBE_TIMEOUT_S = 2.0


async def is_healthy(host: str, port: int, *, has_tls: bool) -> bool:
    """Whether `GET /health` is answered with 200. Whose certificate it is does not matter: the port is our child's."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            context = _trusting() if has_tls else None
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            try:
                writer.write(f"GET /health HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
                return (await reader.readline()).split()[1:2] == [b"200"]
            finally:
                writer.transport.abort()  # TLS would wait for the other side's goodbye, beyond the end of a short loop
    except OSError:  # TimeoutError is one
        return False


def local_address(hostname: str) -> str:
    """Where to reach a server of this machine that listens on `hostname`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(hostname, hostname)


def _trusting() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
