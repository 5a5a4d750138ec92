"""Rules of unions of threats."""

from __future__ import annotations

from mat_dist.config.fields import parse_threats
from mat_dist.config.registry import entries, heard_by, rule
from mat_dist.config.schema import Config
from mat_dist.errors import ConfigError


@rule("union", "peers", "loss")
def unions_fit(config: Config) -> list[ConfigError]:
    """A union has several norms, and the strategy can make them."""
    found = []
    for index, (key, peer) in enumerate(entries(config)):
        union, heard = peer.union, heard_by(config, index)
        try:
            threats = parse_threats(union.threats) if union.threats else []
        except ValueError as error:
            found.append(ConfigError(str(error), f"{key}.union.threats", "write norm:eps, such as linf:8/255,l2:0.5"))
            continue
        norms = [norm for norm, _ in threats]
        taught = {config.peers[i].threat.norm for i in heard}
        where = f"{key}.union.threats"
        if threats and union.strategy is None:
            found.append(ConfigError("union.threats without a strategy", f"{key}.union.strategy",
                                     "write avg, max, random, eat, msd or ramp"))
        elif union.strategy == "msd" and not threats and heard:
            found.append(ConfigError("strategy msd goes through the steps of an attack, and AEs of other peers are "
                                     "finished", where, "name the threats for AEs of its own, or write strategy: avg, "
                                                        "max, random, eat or ramp"))
        elif union.strategy and peer.loss.hard_own and len(norms) < 2:
            found.append(ConfigError(f"strategy {union.strategy} with {len(norms)} threats", where,
                                     "write two or more, such as linf:8/255,l2:1/2,l1:12"))
        elif len(set(norms)) < len(norms):
            found.append(ConfigError("a union with one norm twice", where, "write each norm once"))
        elif union.strategy == "eat" and peer.loss.hard_own and not {"linf", "l1"} <= set(norms):
            found.append(ConfigError("strategy eat without linf and l1", where, "name both"))
        elif union.strategy in ("max", "ramp", "random", "eat") and not peer.loss.hard_own and len(taught) < 2:
            found.append(ConfigError(f"strategy {union.strategy}, and the specialists have {len(taught)} norms",
                                     f"{key}.union.strategy", "add a specialist for each norm"))
        elif union.strategy and not peer.loss.hard_own and (missing := sorted(set(norms) - taught)):
            found.append(ConfigError(f"no specialist for {', '.join(missing)}", where, "add one or leave the norm out"))
    return found


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
