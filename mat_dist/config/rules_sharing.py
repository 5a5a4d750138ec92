"""Rules of what peers share beside their opinions: attackers that change with every step, initial and mean
weights."""

from __future__ import annotations

from mat_dist.config.presets import hears
from mat_dist.config.registry import entries, rule
from mat_dist.config.schema import Config, PeerConfig
from mat_dist.errors import ConfigError


@rule("loss", "peers", "union", "optim", "attack")
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
    keep = "attackers: all"
    back = f"write {keep}"
    if not accompanied:
        found.append(("without another peer", "loss.attackers", f"{back}, or more peers"))
    if peer.role != "peer":
        found.append((f"with role {peer.role}", "role", "write role: peer, or attackers: all"))
    if peer.union.strategy is not None:
        found.append((f"with strategy {peer.union.strategy}", "union.strategy", "leave the strategy out, or " + back))
    if peer.attack.split_batch:
        found.append(("with a batch that all peers make together", "attack.split_batch",
                      f"write split_batch: false, or {keep}"))
    if peer.attack.method == "free":
        found.append(("with perturbations from the gradient of learning", "attack.method",
                      f"write method: pgd, or {keep}"))
    if peer.attack.start == "previous":
        found.append(("with perturbations that are carried on", "attack.start",
                      f"write start: uniform, or {keep}"))
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


@rule("step", "peers", "model")
def weights_can_be_pulled(config: Config) -> list[ConfigError]:
    """A mean of weights needs several peers of one architecture, all of which train."""
    if not config.step.pull:
        return []
    how, first = "write pull: 0", config.peers[0]
    if len(config.peers) == 1:
        return [ConfigError("there is one peer, and nothing to pull it to", "step.pull", f"{how}, or more peers")]
    found = [ConfigError(f"peers are pulled together, and {peer.name} does not train", f"{key}.frozen",
                         f"{how}, or let all peers train") for key, peer in entries(config) if peer.frozen]
    return found + [ConfigError(f"peers are pulled together, and {first.name} and {peer.name} have different models",
                                f"{key}.model", f"{how}, or give all peers one model")
                    for key, peer in entries(config) if peer.model != first.model]


@rule("peers")
def initial_weights_are_drawn(config: Config) -> list[ConfigError]:
    """A peer that starts from a run draws no weights."""
    return [ConfigError("initial weights from a run and from a random stream", f"{key}.init_stream",
                        "leave init_stream or init_from out")
            for key, peer in entries(config) if peer.init_stream is not None and peer.init_from is not None]


def _start(peer: PeerConfig) -> object:
    """What tells a peer's initial weights from those of another architecture's."""
    return peer.init_from or (peer.stream if peer.init_stream is None else peer.init_stream)


def sharing_warnings(config: Config) -> list[str]:
    """What is allowed but unusual in what peers share, one line each."""
    found = []
    if config.step.pull and len({_start(peer) for peer in config.peers}) > 1:
        found.append("step.pull draws peers together that start from different weights, whose mean is no useful "
                     "network at first; peers.all.init_stream=0 lets them start alike")
    deaf = [str(peer.name) for peer in config.peers
            if peer.role == "generalist" and not peer.frozen and peer.union.threats is None]
    if deaf:
        found.append(f"{', '.join(deaf)}: a generalist without AEs of its own stays open to those made against it (5 % "
                     "on the union where one with them had 54 %, docs/evidence.md); write union.strategy: msd and "
                     "union.threats, with attack.method: pgd")
    roles = {peer.role for peer in config.peers}
    if "specialist" in roles and roles <= {"specialist"} and not any(peer.frozen for peer in config.peers):
        found.append("specialists alone: nobody learns from them; role: generalist is the peer that does")
    fixed = [(_start(peer), peer.model_copy(update={"name": "", "stream": 0, "init_stream": 0}))
             for peer in config.peers if peer.attack.start == "zero" and not peer.frozen]
    if any(one in fixed[:n] for n, one in enumerate(fixed)):
        found.append("peers with equal settings and initial weights attack from the clean image: without dropout they "
                     "stay equal; write attack.start: uniform")
    return found
