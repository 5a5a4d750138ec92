"""Where ranks would meet, and through which interface they would talk, as the environment says. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mat_dist.errors import EnvironmentFault

DEFAULT_PORT = 29500  # torchrun's --master-port


@dataclass(frozen=True)
class Endpoint:
    """What is set before a launch.

    Attributes:
        address: MASTER_ADDR.
        port: MASTER_PORT, else torchrun's default.
        given: whether MASTER_PORT is set.
        gloo: GLOO_SOCKET_IFNAME, names of interfaces separated by commas.
        nccl: NCCL_SOCKET_IFNAME, beginnings of names; `^` excludes, `=` asks for the whole name.
    """

    address: str | None = None
    port: int = DEFAULT_PORT
    given: bool = False
    gloo: str | None = None
    nccl: str | None = None

    @classmethod
    def from_environment(cls) -> Endpoint:
        """Raises EnvironmentFault for a MASTER_PORT that is no port."""
        env = os.environ
        text = env.get("MASTER_PORT") or str(DEFAULT_PORT)
        if not (text.isascii() and text.isdigit() and 0 < int(text[:9]) < 65536 and len(text) < 6):
            raise EnvironmentFault(f"{text[:40]!r} is no port", "MASTER_PORT", "set it to a number from 1024 to 65535")
        return cls(env.get("MASTER_ADDR") or None, int(text), bool(env.get("MASTER_PORT")),
                   env.get("GLOO_SOCKET_IFNAME") or None, env.get("NCCL_SOCKET_IFNAME") or None)
