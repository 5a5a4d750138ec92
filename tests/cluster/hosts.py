"""Two hosts on one machine: network namespaces joined by a virtual cable, each with a host name and address of its own.

Needs root and iproute2. Each host has its own UTS namespace, since torchrun and gloo look up the name of their host and
fail where it does not resolve; the file /etc/hosts is bind-mounted for the processes of a host only.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

START = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'


def ip(*words: str) -> None:
    """Run iproute2; raises CalledProcessError."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


class Host:
    """One namespace with one end of the cable."""

    def __init__(self, letter: str, number: int, folder: Path, tag: str) -> None:
        self.name, self.address = f"host{letter}", f"10.99.0.{number}"
        self.namespace, self.device = f"matdist{letter}{tag}", f"v{letter}{tag}"
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, command: list[str], log: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a command on this host, in a session of its own; its output is appended to `log`."""
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "bash", "-c", START,
                  str(self.folder / "hosts"), self.name, *command]
        with log.open("ab") as out:
            process = subprocess.Popen(inside, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                                       start_new_session=True, env={**variables, "GLOO_SOCKET_IFNAME": self.device})
        self.started.append(process)
        return process

    def ranks(self) -> list[int]:
        """Processes in this namespace that train; torchrun is none of them."""
        found = []
        for pid in self.pids():
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"mat_dist.train" in words and b"torch.distributed.run" not in words:
                    found.append(pid)
        return found

    def pids(self) -> list[int]:
        """Processes in this namespace."""
        done = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, timeout=20)
        return [int(word) for word in done.stdout.split()]

    def stop_all(self) -> None:
        """Kill what runs here: only what was started on this host lives in its namespace."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.wait(timeout=20)
        self.started.clear()


class TwoHosts:
    """The hosts `a` and `b`; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        tag = str(os.getpid())
        self.a, self.b = Host("a", 1, folder, tag), Host("b", 2, folder, tag)
        self.folder = folder

    def __enter__(self) -> TwoHosts:
        lines = [f"{host.address} {host.name}" for host in (self.a, self.b)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        try:
            for host in (self.a, self.b):
                ip("netns", "add", host.namespace)
            ip("link", "add", self.a.device, "netns", self.a.namespace, "type", "veth",
               "peer", "name", self.b.device, "netns", self.b.namespace)
            for host in (self.a, self.b):
                ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.device)
                ip("-n", host.namespace, "link", "set", "lo", "up")
            self.link(up=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def link(self, *, up: bool) -> None:
        """Plug the cable in or pull it out, at both ends."""
        for host in (self.a, self.b):
            ip("-n", host.namespace, "link", "set", host.device, "up" if up else "down")

    def __exit__(self, *_: object) -> None:
        for host in (self.a, self.b):
            host.stop_all()
            with suppress(subprocess.CalledProcessError):  # it may never have been made
                ip("netns", "del", host.namespace)
