"""Sockets that reach the loopback interface only (kernels talk over it); everything else raises."""

import socket

_LOOPBACK = ("127.0.0.1", "::1", "localhost", "", None)


def _check(host) -> None:
    if host not in _LOOPBACK:
        raise OSError(f"the tests have no network, but something asks for {host!r}")


def _guarded(name):
    original = getattr(socket.socket, name)

    def method(self, *arguments):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _check(arguments[-1][0])  # connect(address), sendto(data, [flags,] address)
        return original(self, *arguments)

    return method


for _name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, _name, _guarded(_name))

_getaddrinfo = socket.getaddrinfo


def _local_getaddrinfo(host, *arguments, **options):
    _check(host.decode() if isinstance(host, bytes) else host)
    return _getaddrinfo(host, *arguments, **options)


socket.getaddrinfo = _local_getaddrinfo
