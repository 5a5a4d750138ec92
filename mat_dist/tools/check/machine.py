"""This node: versions, port, address, interfaces. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import platform
import re
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata

from mat_dist.distributed.launch import Endpoint
from mat_dist.errors import EnvironmentFault
from mat_dist.runs.record import versions
from mat_dist.tools.check import Answer

OLDEST_TORCH = (2, 9)
SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


# ---------------------------------------------------------------- ports


def check_port(endpoint: Endpoint, ranks: int) -> Answer[int]:
    """Whether a store can listen on the port. Raises EnvironmentFault where somebody else does."""
    port = endpoint.port
    if ranks == 1 and not endpoint.given:
        return Answer(port, "one rank needs none")
    here = endpoint.address is None or is_here(endpoint.address)
    elsewhere = f"the ranks meet on {endpoint.address}: check it there"
    try:
        _listen(port)
    except OSError as error:
        if error.errno == errno.EACCES:
            raise EnvironmentFault(f"port {port} is for root only", "the port", "use one from 1024") from error
        if here:
            raise EnvironmentFault(f"port {port} is in use ({os.strerror(error.errno or 0)})",
                                   endpoint.address or "this node",
                                   "on one node use torchrun --standalone, which finds a free port; on several set "
                                   f"another one with --master-port or --rdzv-endpoint, e.g. {free_port()}; "
                                   f"ss -ltnp sport = :{port} tells by whom") from error
        return Answer(port, f"port {port} is in use here", elsewhere)
    return Answer(port, f"port {port} is free" + ("" if here else " here"), "" if here else elsewhere)


def _listen(port: int) -> None:
    """Listen for a moment as the store does: on all interfaces, SO_REUSEADDR (a closed connection blocks nobody)."""
    both = socket.has_dualstack_ipv6()
    socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both).close()


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


# ---------------------------------------------------------------- addresses


def is_here(host: str) -> bool:
    """Whether `host` is this machine: a name or address that leads to one of its own."""
    if host in ("localhost", socket.gethostname(), socket.getfqdn()):
        return True
    try:
        told = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return any(ipaddress.ip_address(one.partition("%")[0]).is_loopback for one in told) \
        or bool(told & set(interfaces().values()))


def interfaces() -> dict[str, str]:
    """IPv4 address of each interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def check_address(endpoint: Endpoint, nodes: int) -> Answer[str]:
    """The address that a rank of this node tells the others: that of its interface, else of its host name.

    Raises EnvironmentFault where ranks of other nodes could not reach it.
    """
    host = socket.gethostname()
    if endpoint.gloo:
        address = interfaces().get(endpoint.gloo.split(",")[0], "none")
        return Answer(address, f"{host} advertises {address}, the address of {endpoint.gloo} (GLOO_SOCKET_IFNAME)")
    others = ", ".join(name for name, one in interfaces().items() if not one.startswith("127."))
    how = (f"set GLOO_SOCKET_IFNAME to the interface between the nodes ({others or 'none is up here'}), or correct "
           "/etc/hosts")
    try:
        address = str(socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)[0][4][0])
    except OSError as error:
        if nodes == 1 and metadata.entry_points(group="torchrun.handlers", name="mat_dist_local"):
            return Answer("127.0.0.1", f"the host name {host} has no address; ranks on one node use 127.0.0.1")
        raise EnvironmentFault(f"the host name {host} has no address ({error.strerror})", "/etc/hosts, DNS",
                               how if nodes > 1 else "torchrun would look for it for minutes: start it with "
                               "--local-addr=127.0.0.1, or install mat_dist (pip install --editable .), which does that"
                               ) from error
    if nodes == 1:
        return Answer(address, f"{host} is {address}; ranks on one node use 127.0.0.1")
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise EnvironmentFault(f"the host name {host} leads to {address}, which other nodes cannot reach", "/etc/hosts",
                               how)
    if address not in interfaces().values() and ":" not in address:
        return Answer(address, f"{host} is {address}, which no interface of this node has", how)
    return Answer(address, f"{host} advertises {address}")


def check_interfaces(endpoint: Endpoint, nodes: int) -> Answer[Mapping[str, str]]:
    """Whether the interfaces that the environment names exist and reach other nodes. Raises EnvironmentFault."""
    there = interfaces()
    listed = ", ".join(f"{name} {address}" for name, address in there.items())
    how = f"this node has {listed or 'none'}"
    for name in (endpoint.gloo or "").split(",") if endpoint.gloo else ():
        if name not in there:
            what = "GLOO_SOCKET_IFNAME takes whole names, no patterns" if re.search(r"[\^=*]", name) else \
                "there is no such interface, or it has no IPv4 address"
            raise EnvironmentFault(f"{what}: {name[:40]!r}", "GLOO_SOCKET_IFNAME", how)
        if nodes > 1 and there[name].startswith("127."):
            raise EnvironmentFault(f"{name} does not reach other nodes", "GLOO_SOCKET_IFNAME", how)
    if endpoint.nccl and not nccl_matches(endpoint.nccl, list(there)):
        raise EnvironmentFault(f"no interface fits {endpoint.nccl[:40]!r}", "NCCL_SOCKET_IFNAME", how)
    named = [f"{variable}={value}" for variable, value in (("GLOO_SOCKET_IFNAME", endpoint.gloo),
                                                           ("NCCL_SOCKET_IFNAME", endpoint.nccl)) if value]
    return Answer(there, f"{listed or 'none'}; {', '.join(named) or 'GLOO_/NCCL_SOCKET_IFNAME are not set'}",
                  details={"interfaces": there})


def nccl_matches(pattern: str, names: list[str]) -> list[str]:
    """The interfaces that NCCL would take: `eth,ib` are beginnings, `=eth0` a whole name, `^docker` all others.

    https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-socket-ifname
    """
    excludes, words = pattern.startswith("^"), pattern.removeprefix("^")
    whole, words = words.startswith("="), words.removeprefix("=")
    parts = [word for word in words.split(",") if word]

    def fits(name: str) -> bool:
        return any(name == part.partition(":")[0] if whole else name.startswith(part) for part in parts)

    return [name for name in names if fits(name) != excludes]


# ---------------------------------------------------------------- versions


def check_versions() -> Answer[bool]:
    """Python, torch, torchvision, numpy, pydantic, CUDA, NCCL. Raises EnvironmentFault where torch cannot be used."""
    found = {**{name: one for name, one in versions().items() if name != "system"},
             "pydantic": metadata.version("pydantic")}
    try:
        import torch
        import torchvision  # noqa: F401  (its compiled part must fit torch)
    except (ImportError, OSError, RuntimeError) as error:
        raise EnvironmentFault(f"torch or torchvision cannot be imported: {error}", _listed(found),
                               "install a torchvision that was made for this torch: pip install torch torchvision") \
            from error
    found["CUDA"] = str(torch.version.cuda or "none")
    if hasattr(torch._C, "_nccl_version"):  # not in builds for the CPU
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    numbers = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if numbers < OLDEST_TORCH:
        raise EnvironmentFault(f"torch {torch.__version__}", _listed(found), "install torch 2.9 or later")
    return Answer(True, f"{_listed(found)}, {platform.system()}", details={"versions": found})


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())
