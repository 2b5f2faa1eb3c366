"""Take the address that the service listens on before anything is loaded."""

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def joined(host: str, port: int) -> str:
    """Return an address as a URL has it: IPv6 in brackets (RFC 3986, section 3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def taken(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Hold the address, each one that a name stands for, from before anything is loaded; an OSError names it.

    Nothing listens there yet. Addresses of a name that this machine has not, as of IPv6, are left out beside others.
    """
    with ExitStack() as held:
        sockets: list[socket.socket] = []
        try:
            places = dict.fromkeys(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            for last, (family, _, _, _, address) in enumerate(places, start=1 - len(places)):
                try:
                    sockets.append(held.enter_context(_bound(family, address)))
                except OSError as error:
                    if error.errno not in ABSENT or (last == 0 and not sockets):
                        raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, joined(host, port)) from error
        yield sockets


def _bound(family: socket.AddressFamily, address: tuple[str | int | bytes, ...]) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what was closed a minute ago is free
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a socket of its own
        one.bind(address)
    except OSError:
        one.close()
        raise
    return one
