"""Rules of what peers share beside their opinions: attackers that change with every step."""

from __future__ import annotations

from mat_dist.config.presets import hears
from mat_dist.config.registry import entries, rule
from mat_dist.config.schema import Config, PeerConfig
from mat_dist.errors import ConfigError


@rule("loss", "peers", "union", "optim")
def attackers_can_rotate(config: Config) -> list[ConfigError]:
    """Sources that change from step to step need other peers, equal roles and terms that can move with them."""
    found = []
    for index, (key, peer) in enumerate(entries(config)):
        if peer.loss.attackers == "all" or peer.frozen:
            continue
        others = [i for i, other in enumerate(config.peers)
                  if i != index and hears(peer.role, other.role, other.frozen)]
        found += [ConfigError(f"attackers {peer.loss.attackers} {what}", f"{key}.{where}", how)
                  for what, where, how in _in_the_way(peer, bool(others))]
    return found


def _in_the_way(peer: PeerConfig, accompanied: bool) -> list[tuple[str, str, str]]:
    """What keeps a peer's sources from changing, where that is set, and how to go on."""
    loss, found = peer.loss, []
    back = "write attackers: all"
    if not accompanied:
        found.append(("without another peer", "loss.attackers", f"{back}, or more peers"))
    if peer.role != "peer":
        found.append((f"with role {peer.role}", "role", "write role: peer, or attackers: all"))
    if peer.union.strategy is not None:
        found.append((f"with strategy {peer.union.strategy}", "union.strategy", "leave the strategy out, or " + back))
    if loss.attackers == "one":
        if peer.optim.awp_gamma:
            found.append(("with adversarial weight perturbation, which climbs the loss on own AEs", "optim.awp_gamma",
                          "write awp_gamma: 0, or attackers: partner"))
        if loss.teacher_set == "owner" and loss.kd_weight:
            found.append(("with teacher_set owner: on its own AEs the attacker has no teacher", "loss.teacher_set",
                          "write teacher_set: all"))
    elif not ((loss.hard_weight and loss.hard_own != 1) or (loss.kd_weight and loss.kd_own != 1)):
        found.append(("gives the partner's AEs no weight", "loss.attackers",
                      "write hard_own or kd_own below 1, or attackers: all"))
    return found
