"""Rules of unions of threats."""

from __future__ import annotations

from mat_dist.config.fields import parse_threats
from mat_dist.config.registry import entries, heard_by, rule
from mat_dist.config.schema import Config
from mat_dist.config.union import UnionConfig
from mat_dist.errors import ConfigError


@rule("union")
def unions_can_be_read(config: Config) -> list[ConfigError]:
    """Threats are norms with radii, each norm once, and come with a strategy."""
    found = []
    for key, peer in entries(config):
        union, where = peer.union, f"{key}.union.threats"
        try:
            norms = [norm for norm, _ in parse_threats(union.threats)] if union.threats else []
        except ValueError as error:
            found.append(ConfigError(str(error), where, "write norm:eps, such as linf:8/255,l2:0.5"))
            continue
        if norms and union.strategy is None:
            found.append(ConfigError("union.threats without a strategy", f"{key}.union.strategy",
                                     "write avg, max, random, eat, msd or ramp"))
        if len(set(norms)) < len(norms):
            found.append(ConfigError("a union with one norm twice", where, "write each norm once"))
    return found


@rule("union", "loss")
def unions_of_own_aes_fit(config: Config) -> list[ConfigError]:
    """A peer that makes AEs for a union has several norms, and those that its strategy needs."""
    found = []
    for key, peer in entries(config):
        union, norms = peer.union, _norms(peer.union)
        if norms is None or not union.strategy or not peer.loss.hard_own:
            continue
        where = f"{key}.union.threats"
        if len(norms) < 2:
            found.append(ConfigError(f"strategy {union.strategy} with {len(norms)} threats", where,
                                     "write two or more, such as linf:8/255,l2:1/2,l1:12"))
        elif union.strategy == "eat" and not {"linf", "l1"} <= set(norms):
            found.append(ConfigError("strategy eat without linf and l1", where, "name both"))
    return found


@rule("union", "peers", "loss")
def unions_of_received_aes_fit(config: Config) -> list[ConfigError]:
    """A peer that learns a union from others' AEs hears several norms, and names none that nobody makes."""
    found = []
    for index, (key, peer) in enumerate(entries(config)):
        union, heard = peer.union, heard_by(config, index)
        if not union.strategy or peer.loss.hard_own or not heard:
            continue
        norms = {config.peers[i].threat.norm for i in heard}
        if union.threats:
            found.append(ConfigError("union.threats, and this peer learns from the AEs of others alone",
                                     f"{key}.union.threats",
                                     "leave them out: the threats of those peers count; or give loss.hard_own a share, "
                                     "for AEs of its own"))
        elif union.strategy == "msd":
            found.append(ConfigError("strategy msd goes through the steps of an attack, and AEs of other peers are "
                                     "finished", f"{key}.union.threats",
                                     "name the threats for AEs of its own, or write strategy: avg, max, random, eat or "
                                     "ramp"))
        elif len(norms) < 2:
            found.append(ConfigError(f"strategy {union.strategy}, and the specialists have {len(norms)} norms",
                                     f"{key}.union.strategy", "add a specialist for each norm"))
    return found


def _norms(union: UnionConfig) -> list[str] | None:
    """Norms of the threats in their order; None where they cannot be read."""
    try:
        return [norm for norm, _ in parse_threats(union.threats)] if union.threats else []
    except ValueError:
        return None


@rule("union", "loss")
def unions_have_hard_labels(config: Config) -> list[ConfigError]:
    """The worst or the mean over several norms is that of plain cross-entropies on AEs."""
    found = []
    for key, peer in entries(config):
        strategy, loss = peer.union.strategy, peer.loss
        if strategy in ("avg", "max", "ramp") and not loss.hard_weight and not peer.frozen:
            found.append(ConfigError(f"strategy {strategy} with preset {loss.preset}, which has no hard labels on AEs",
                                     f"{key}.union.strategy", "write loss.preset: at, or strategy random, eat or msd"))
        elif strategy in ("max", "ramp") and loss.hard_loss == "bce":
            found.append(ConfigError(f"strategy {strategy} compares cross-entropies, and hard_loss is bce",
                                     f"{key}.loss.hard_loss", "write hard_loss: ce, or strategy avg"))
    return found


@rule("union")
def projection_belongs_to_ramp(config: Config) -> list[ConfigError]:
    """Gradient projection is the second half of RAMP."""
    return [ConfigError(f"projection_beta {peer.union.projection_beta:g} with strategy {peer.union.strategy}",
                        f"{key}.union.projection_beta", "write 0, or strategy: ramp")
            for key, peer in entries(config) if peer.union.projection_beta and peer.union.strategy != "ramp"]
