"""Rules of the training attack."""

from __future__ import annotations

from mat_dist.config.presets import PAIRS
from mat_dist.config.registry import entries, rule
from mat_dist.config.schema import Config, PeerConfig
from mat_dist.errors import ConfigError


@rule("attack", "union", "peers", "loss", "train")
def free_attacks_fit(config: Config) -> list[ConfigError]:
    """Free-AT steps along the image gradient of learning: the peer has to learn hard labels on its own AEs, and all
    peers see a batch equally often."""
    found, free = [], [peer.attack.method == "free" for peer in config.peers]
    if not any(free):
        if config.train.replays > 1:
            found.append(ConfigError(f"each batch is used {config.train.replays} times, and no attack.method is free",
                                     "train.replays", "write 1, or attack.method: free"))
        return found
    if config.train.replays == 1:
        found.append(ConfigError("attack.method free with one replay of a batch: its AEs would be of the batch before",
                                 "train.replays", "write 8 (Free-AT on CIFAR-10), and train.epochs divided by it"))
    for (key, peer), one in zip(entries(config), free, strict=True):
        if not one:
            found.append(ConfigError(f"attack.method {peer.attack.method} beside peers with free, which replay batches",
                                     f"{key}.attack.method", "give all peers the same method"))
            continue
        labels = bool(peer.loss.hard_weight and peer.loss.hard_own)
        for bad, what, where, how in (
                (peer.attack.steps != 1, f"attack.steps {peer.attack.steps}", "attack.steps", "attack.steps: 1"),
                (peer.attack.start != "zero", f"attack.start {peer.attack.start}", "attack.start", "start: zero"),
                (peer.attack.loss != "ce", f"attack.loss {peer.attack.loss}", "attack.loss", "attack.loss: ce"),
                (peer.union.strategy is not None, f"union.strategy {peer.union.strategy}", "union.strategy",
                 "attack.method: pgd"),
                (peer.frozen, "a peer that does not learn", "frozen", "frozen: false"),
                (not labels, f"preset {peer.loss.preset}, which has no hard labels on own AEs", "loss.preset",
                 "loss.preset: at")):
            if bad:
                found.append(ConfigError(f"attack.method free with {what}", f"{key}.{where}", f"write {how}"))
    return found


@rule("attack", "loss")
def attack_can_start(config: Config) -> list[ConfigError]:
    """KL to the clean prediction has gradient 0 at the clean image."""
    return [ConfigError("the attack loss kl_clean has no gradient at its start, the clean image", f"{key}.attack.start",
                        "write start: gaussian (TRADES) or uniform")
            for key, peer in entries(config) if peer.attack.loss == "kl_clean" and peer.attack.start == "zero"]


@rule("attack", "threat", "step", "union")
def n_fgsm_fits(config: Config) -> list[ConfigError]:
    """N-FGSM is one step in linf, and its AEs leave the ball, to which shorter forms on the wire would cut them."""
    found = []
    for key, peer in entries(config):
        if peer.attack.method != "n_fgsm":
            continue
        for bad, where, how in ((peer.attack.steps != 1, "attack.steps", "attack.steps: 1"),
                                (peer.threat.norm != "linf", "threat.norm", "threat.norm: linf"),
                                (peer.union.strategy is not None, "union.strategy", "attack.method: pgd")):
            if bad:
                what = f"n_fgsm with {where} {_value(peer, where)}"
                found.append(ConfigError(what, f"{key}.{where}", f"write {how}"))
        if config.step.wire != "full":
            found.append(ConfigError("AEs of n_fgsm leave the ball, to which shorter ones are cut", "step.wire",
                                     "write wire: full, or attack.method: pgd"))
    return found


def _value(peer: PeerConfig, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(peer, section), name)


@rule("attack", "train")
def attack_steps_grow(config: Config) -> list[ConfigError]:
    """One step cannot grow, and the full attack is reached within the training."""
    found = []
    for key, peer in entries(config):
        attack, where = peer.attack, f"{key}.attack.steps_warmup_epochs"
        if attack.steps_warmup_epochs and attack.steps == 1:
            found.append(ConfigError("the number of attack steps grows up to 1", where, "write 0, or more steps"))
        elif attack.steps_warmup_epochs > config.train.epochs:
            found.append(ConfigError(f"the number of attack steps grows for {attack.steps_warmup_epochs:g} of "
                                     f"{config.train.epochs} epochs", where, "write train.epochs or fewer"))
    return found


@rule("attack", "union", "peers", "loss", "threat", "optim", "train", "step")
def batches_can_be_split(config: Config) -> list[ConfigError]:
    """A batch that all peers make together is everybody's own AEs: there are no others, and their kind is one."""
    split = [peer.attack.split_batch for peer in config.peers]
    if not any(split):
        return []
    where, count, found = "attack.split_batch", len(config.peers), []
    rows = config.train.batch_size // config.step.microbatches
    for bad, what in ((not all(split), "some peers only"), (count == 1, "one peer"),
                      (rows % count > 0, f"{rows} images (per micro-batch) for {count} peers: no multiple"),
                      (config.step.on_nonfinite == "quarantine", "on_nonfinite quarantine: a part would be missing")):
        if bad:
            found.append(ConfigError(f"a split batch with {what}", f"peers.0.{where}", "write split_batch: false"))
    for key, peer in entries(config):
        loss, attack = peer.loss, peer.attack
        unfit = [f"{name} {value}" for name, value, bad in (
            ("hard_own", loss.hard_own, loss.hard_weight and loss.hard_own != 1),
            ("kd_own", loss.kd_own, loss.kd_weight and loss.kd_own != 1),
            ("teacher_set", loss.teacher_set, loss.teacher_set != "all")) if bad]
        told = f" ({', '.join(unfit)})" if unfit and loss.preset not in PAIRS else ""
        for bad, what, how in (
                (loss.preset in PAIRS or bool(unfit),
                 f"preset {loss.preset}{told}, which tells own AEs from others'",
                 "loss: at, at_wa, mart, trades, mat_kd or dml_at, with hard_own: 1 and kd_own: 1"),
                (peer.frozen or peer.role != "peer", "roles or frozen peers", "split_batch: false"),
                (peer.threat != config.peers[0].threat, "threats that differ", "split_batch: false"),
                (peer.union.strategy is not None, f"union.strategy {peer.union.strategy}", "split_batch: false"),
                (attack.method == "free" or attack.start == "previous", "perturbations that a peer carries on",
                 "split_batch: false"),
                (peer.optim.awp_gamma > 0, "optim.awp_gamma, which climbs before the batch is whole", "awp_gamma: 0")):
            if bad:
                found.append(ConfigError(f"a split batch with {what}", f"{key}.{where}", f"write {how}"))
    return found


@rule("attack", "union", "data")
def previous_perturbations_fit(config: Config) -> list[ConfigError]:
    """A perturbation is kept per real image and threat, in a frame that crops by padding and mirroring can be undone
    in."""
    augment, data, found = config.data.augment, config.data, []
    lost = [name for name, on in (("random_resized_crop", augment.random_resized_crop), ("cutout", augment.cutout),
                                  ("idbh", augment.idbh != "off"), ("cutmix", augment.cutmix)) if on]
    for key, peer in entries(config):
        attack, where = peer.attack, f"{key}.attack.start"
        if attack.start != "previous":
            if attack.reset_epochs:
                found.append(ConfigError(f"perturbations are forgotten every {attack.reset_epochs} epochs, and none "
                                         "are kept", f"{key}.attack.reset_epochs", "write 0, or start: previous"))
            continue
        if attack.method == "n_fgsm":
            found.append(ConfigError("n_fgsm has a start of its own", where, "leave start out, or write method: pgd"))
        if peer.union.strategy is not None:
            found.append(ConfigError(f"perturbations are kept for one threat, and the peer has union.strategy "
                                     f"{peer.union.strategy}", where, "write start: uniform"))
        if lost:
            found.append(ConfigError(f"a perturbation cannot be carried through data.augment.{lost[0]}", where,
                                     f"switch {', '.join(lost)} off (pad and flip can stay), or write start: uniform"))
        if data.generated:
            found.append(ConfigError("perturbations are not kept for generated images", where,
                                     "leave data.generated out, or write start: uniform"))
    return found
