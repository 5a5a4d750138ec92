"""What the others of a cohort must know of a peer."""

from __future__ import annotations

from dataclasses import dataclass

from mat_dist.attacks.norms import Threat
from mat_dist.config.fields import parse_threats
from mat_dist.config.schema import PeerConfig


@dataclass(frozen=True)
class Member:
    """What the others of a cohort must know of a peer.

    Attributes:
        role: `peer`, `specialist` or `generalist`.
        frozen: it does not train.
        threat: what its AEs are made for.
        strategy, union: how it trains against several threats, and which; its own threat first.
        ramp_weight: of RAMP's pairing.
    """

    role: str
    frozen: bool
    threat: Threat
    strategy: str | None
    union: tuple[Threat, ...]
    ramp_weight: float

    @classmethod
    def of(cls, spec: PeerConfig) -> Member:
        """From a complete entry."""
        union = parse_threats(spec.union.threats) if spec.union.threats else ()
        return cls(spec.role, spec.frozen, Threat(spec.threat.norm, spec.threat.eps), spec.union.strategy,
                   tuple(Threat(norm, eps) for norm, eps in union), spec.union.ramp_weight)
