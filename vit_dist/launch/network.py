"""Checks of this node before the launcher starts: packages, the address of node 0, its port, the network interface."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable

from vit_dist.errors import UserError
from vit_dist.launch.topology import Asked, Topology, host
from vit_dist.listing import shortened

_SIOCGIFADDR = 0x8915


def check_packages(packages: Iterable[str]) -> None:
    """Raises UserError for the first that this interpreter does not have; imports none."""
    for package in packages:
        if not _is_installed(package):
            cure = "pip install deepspeed" if package == "deepspeed" else "activate its environment, or set PYTHON"
            raise UserError(f"{package} is not installed for {sys.executable}; {cure}")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # ValueError: None stands for it in sys.modules
        return False


def check_network(topology: Topology, asked: Asked) -> None:
    """Raises UserError for an address that is not known here, or a port that is taken."""
    try:
        socket.getaddrinfo(topology.address, None)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host can be like this
        raise UserError(
            f"{asked.label('master_addr')}={shortened(topology.address, 100)} is not known on {host()} "
            f"({getattr(error, 'strerror', None) or 'not a host name'}); set it to the address of node 0"
        ) from None
    if topology.listens and topology.port is not None:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that has just ended is no obstacle
            try:
                listener.bind(("", topology.port))
            except OSError as error:
                label = asked.label("master_port")
                raise UserError(
                    f"{label}={topology.port} cannot be used on {host()} ({error.strerror}); set another one"
                ) from None


def interface_of(topology: Topology) -> str | None:
    """The interface for GLOO_SOCKET_IFNAME, if gloo would find the wrong one.

    Gloo tells the others the address that this host's name has here, which some installers make 127.0.1.1.
    """
    address = topology.address
    if topology.nodes == 1 or not _is_loopback(host()) or is_here(address):
        return None
    outside = {}
    for _, name in socket.if_nameindex():
        with contextlib.suppress(OSError):  # it has no address
            own = _interface_address(name)
            if not ipaddress.ip_address(own).is_loopback:
                outside[own] = name
    if len(outside) > 1:
        for other in (address, "192.0.2.1"):  # node 0; where the default route leads to
            with contextlib.suppress(OSError):
                if (own := _own_address(other)) in outside:
                    return outside[own]
    return next(iter(outside.values()), None)


def is_here(address: str) -> bool:
    return address == "localhost" or address.startswith("127.")


def _own_address(other: str) -> str:
    """The address that packets to `other` would leave from; none is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))
        return str(probe.getsockname()[0])


def _interface_address(name: str) -> str:
    """The interface's IPv4 address; the standard library has no call for it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        asked = struct.pack("256s", name.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, asked)[20:24])


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(name)).is_loopback
    except OSError:
        return True
