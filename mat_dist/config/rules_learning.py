"""Rules of the mutual loss and of roles: who can learn what from whom."""

from __future__ import annotations

from mat_dist.config.presets import PAIRS
from mat_dist.config.registry import entries, heard_by, rule
from mat_dist.config.schema import Config, LossConfig
from mat_dist.errors import ConfigError


def _alone(c: LossConfig) -> bool:
    """Whether a loss has terms on the peer's own AEs or the clean images that need no teacher."""
    return bool((c.hard_weight and c.hard_own) or c.clean_weight or c.trades_beta or c.mart_beta or c.pair_weight)


@rule("loss", "peers")
def smoothing_has_a_cross_entropy(config: Config) -> list[ConfigError]:
    """Smoothing does nothing without hard labels in a plain cross-entropy: MART's boosted one has no smoothed form."""
    return [ConfigError(f"label_smoothing {c.label_smoothing:g} of preset {c.preset}, which has no cross-entropy that "
                        "takes it", f"{key}.loss.label_smoothing", "write label_smoothing: 0, or give clean_weight or "
                                                                   "hard_weight (with hard_loss: ce) a weight")
            for key, peer in entries(config) for c in [peer.loss] if c.label_smoothing and not peer.frozen
            and not c.clean_weight and (c.hard_loss == "bce" or not c.hard_weight)]


@rule("loss", "peers")
def some_term_counts(config: Config) -> list[ConfigError]:
    """A loss without terms, and a cohort without labels and teachers, learn nothing."""
    found = []
    training = [(key, peer) for key, peer in entries(config) if not peer.frozen]
    for key, peer in training:
        c = peer.loss
        if not (_alone(c) or c.hard_weight or c.kd_weight or c.kd_clean):
            found.append(ConfigError("all terms of the loss have weight 0", f"{key}.loss",
                                     "give hard_weight, clean_weight or kd_weight a weight"))
    labelled = any(peer.loss.hard_weight or peer.loss.clean_weight for _, peer in training)
    if not found and not labelled and not any(peer.frozen for peer in config.peers):
        found.append(ConfigError("no peer learns from labels", "peers.0.loss.hard_weight",
                                 "give hard_weight or clean_weight a weight in at least one peer"))
    return found


def _nobody(config: Config, index: int) -> str:
    """Why a peer has nobody to learn from."""
    if len(config.peers) == 1:
        return "there is one peer"
    return f"there is no peer that a {config.peers[index].role} learns from"


@rule("peers", "loss")
def somebody_is_there_to_learn_from(config: Config) -> list[ConfigError]:
    """Shares for other peers need other peers, shares for frozen teachers a frozen one."""
    found = []
    how = "write loss.preset: at (or trades), or more peers"
    for index, (key, peer) in enumerate(entries(config)):
        loss, heard = peer.loss, heard_by(config, index)
        if peer.frozen:
            continue
        makers = [i for i in heard if config.peers[i].role == "specialist" or config.peers[i].frozen]
        if peer.role == "generalist" and not makers and not peer.union.threats:
            found.append(ConfigError("a generalist without specialists", f"{key}.role",
                                     "give other peers role: specialist, or the generalist union.threats of its own"))
        elif not heard and (loss.kd_weight or loss.kd_clean):
            found.append(ConfigError(f"preset {loss.preset} distils from other peers, and {_nobody(config, index)}",
                                     f"{key}.loss.preset", how))
        elif not heard and loss.hard_weight and loss.hard_own != 1:
            found.append(ConfigError(f"preset {loss.preset} trains on other peers' examples, and "
                                     f"{_nobody(config, index)}", f"{key}.loss.preset", how))
        teachers = [i for i in heard if config.peers[i].frozen]
        if loss.teacher_set == "frozen" and (loss.kd_weight or loss.kd_clean) and not teachers:
            found.append(ConfigError(f"preset {loss.preset} learns from a frozen teacher, and there is none",
                                     f"{key}.loss.teacher_set", "add a peer with frozen: true and init_from: RUN"))
        if peer.attack.loss == "kl_teacher" and not heard:
            found.append(ConfigError(f"the attack loss kl_teacher needs a teacher, and {_nobody(config, index)}",
                                     f"{key}.attack.loss", "write attack.loss: ce or kl_clean, or add a peer"))
    return found


@rule("peers")
def frozen_peers_have_weights(config: Config) -> list[ConfigError]:
    """A peer that does not train starts from trained weights; some peer trains."""
    found = [ConfigError("a frozen peer without trained weights", f"{key}.frozen", "give it init_from: RUN or a file")
             for key, peer in entries(config) if peer.frozen and peer.init_from is None]
    if all(peer.frozen for peer in config.peers):
        found.append(ConfigError("all peers are frozen", "peers.0.frozen", "let at least one train"))
    return found


@rule("loss", "peers")
def presets_for_two(config: Config) -> list[ConfigError]:
    """Presets whose two nets have different parts."""
    return [ConfigError(f"preset {peer.loss.preset} is for 2 peers, here are {len(config.peers)}", f"{key}.loss.preset",
                        "write peers: 2")
            for key, peer in entries(config) if peer.loss.preset in PAIRS and peer.loss.preset != "cat"
            and len(config.peers) != 2]


@rule("loss")
def shares_add_up(config: Config) -> list[ConfigError]:
    """`mat`, `mat_kd` and `dml_at` divide one loss between labels and teachers: (1 - alpha) and alpha."""
    return [ConfigError(f"hard_weight {c.hard_weight:g} and kd_weight {c.kd_weight:g} of preset {c.preset} do not add "
                        "up to 1", f"{key}.loss.hard_weight", "leave hard_weight out, or write preset: at with weights")
            for key, peer in entries(config) if (c := peer.loss).preset in ("mat", "mat_kd", "dml_at")
            and c.hard_weight is not None and c.kd_weight is not None and abs(c.hard_weight + c.kd_weight - 1) > 1e-6]


@rule("loss")
def trust_is_per_teacher(config: Config) -> list[ConfigError]:
    """Weights of single teachers need the divergence of single teachers."""
    return [ConfigError(f"gate and kd_where with {name} {value}", f"{key}.loss.{name}", f"write {name}: {use}")
            for key, peer in entries(config) if peer.loss.gate or peer.loss.kd_where != "all"
            for name, value, use in (("teacher_agg", peer.loss.teacher_agg, "mean_kl"),
                                     ("kd_loss", peer.loss.kd_loss, "kl")) if value != use]


@rule("loss", "train")
def warm_up_ends(config: Config) -> list[ConfigError]:
    """Mutual terms that never begin, and peers that have nothing to learn before they do."""
    found = []
    for key, peer in entries(config):
        loss, where = peer.loss, f"{key}.loss.warmup_epochs"
        if (loss.warmup_epochs or 0) >= config.train.epochs:
            found.append(ConfigError(f"the peer learns alone for {loss.warmup_epochs:g} of {config.train.epochs} "
                                     "epochs", where, "make it shorter than train.epochs, or write preset: at"))
        elif loss.warmup_epochs and not (loss.hard_weight or _alone(loss)) and not peer.frozen:
            found.append(ConfigError(f"a peer with preset {loss.preset} learns from teachers only, and is to warm up "
                                     "without them", where, "write 0, or give hard_weight or clean_weight a weight"))
    return found


@rule("optim", "loss")
def weights_climb_an_own_loss(config: Config) -> list[ConfigError]:
    """AWP perturbs the weights before anything arrives from other peers."""
    return [ConfigError(f"adversarial weight perturbation climbs the loss on own AEs and clean images, and that of "
                        f"preset {peer.loss.preset} has none here", f"{key}.optim.awp_gamma",
                        "write awp_gamma: 0, or give hard_weight (with hard_own) or clean_weight a weight")
            for key, peer in entries(config) if peer.optim.awp_gamma and not peer.frozen and not _alone(peer.loss)]


@rule("step", "optim", "loss")
def averages_are_kept(config: Config) -> list[ConfigError]:
    """Teachers with averaged weights keep them."""
    return [ConfigError("teachers with averaged weights, and the peer keeps none", f"{key}.optim.ema_decay",
                        "write a decay such as 0.999, or step.teachers: raw")
            for key, peer in entries(config)
            if config.step.teachers == "ema" and peer.optim.ema_decay is None and not peer.frozen]


@rule("loss", "peers")
def owner_is_a_peer(config: Config) -> list[ConfigError]:
    """With `teacher_set: owner` nobody teaches on own examples (their owner is the student) or on clean images."""
    found = []
    for key, peer in entries(config):
        if peer.loss.teacher_set != "owner" or len(config.peers) == 1:
            continue
        for name, what in (("kd_own", "own examples"), ("kd_clean", "clean images")):
            if getattr(peer.loss, name) and (name == "kd_clean" or peer.loss.kd_weight):
                found.append(ConfigError(f"teacher_set owner leaves no teacher on {what}, {name} is "
                                         f"{getattr(peer.loss, name):g}", f"{key}.loss.teacher_set",
                                         f"write {name}: 0, or teacher_set: all"))
    return found


@rule("loss", "peers", "step")
def sums_are_enough(config: Config) -> list[ConfigError]:
    """The sum of all probabilities serves every student only where all peers teach all slots in one way."""
    if config.step.opinions == "all":
        return []
    first = config.peers[0].loss
    how = "write opinions: all"
    found = []
    if any(peer.role != "peer" or peer.frozen for peer in config.peers):
        found.append(ConfigError("roles and frozen peers need single peers' logits", "step.opinions", how))
    if config.step.on_nonfinite == "quarantine":
        found.append(ConfigError("a peer in quarantine cannot be taken out of summed opinions", "step.opinions", how))
    for key, peer in entries(config):
        loss = peer.loss
        unfit = {"kd_weight": not loss.kd_weight, "kd_own": not 0 < (loss.kd_own or 0) < 1,
                 "teacher_input": loss.teacher_input != "same_ae", "teacher_set": loss.teacher_set != "all",
                 "teacher_agg": loss.teacher_agg == "mean_logit", "temperature": loss.temperature != first.temperature,
                 "kd_clean": bool(loss.kd_clean), "kd_loss": loss.kd_loss != "kl", "gate": bool(loss.gate),
                 "kd_where": loss.kd_where != "all", "warmup_epochs": bool(loss.warmup_epochs),
                 "attackers": loss.attackers != "all"}
        found += [ConfigError(f"summed opinions with {name} {getattr(loss, name)}: single peers' logits are needed",
                              f"{key}.loss.{name}", how) for name, bad in unfit.items() if bad]
    return found
