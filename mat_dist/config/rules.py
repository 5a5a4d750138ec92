"""Rules between settings but those that a method brings with it (`mat_dist/methods/`).

Each takes a complete configuration and yields what is wrong; `where` is a key. Data and model names are not checked
here: a plug-in may register more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

from mat_dist.config.fields import real_images
from mat_dist.config.methods import methods, presets, strategies
from mat_dist.config.norms import known_norms
from mat_dist.config.presets import fill_attack, fill_loss, hears
from mat_dist.config.schema import AttackConfig, Config, EvalConfig, LossConfig, PeerConfig
from mat_dist.errors import ConfigError

Rule = Callable[[Config], Iterable[ConfigError]]
_RULES: list[tuple[Rule, frozenset[str]]] = []


def rule(*sections: str) -> Callable[[Rule], Rule]:
    """Register a rule that reads `sections` ("peers" are names, streams and number)."""
    def register(function: Rule) -> Rule:
        _RULES.append((function, frozenset(sections)))
        return function
    return register


def check(config: Config, broken: frozenset[str] = frozenset()) -> list[ConfigError]:
    """All problems of all rules, those of methods too, but of rules that read a section of which some values are
    unknown (`broken`)."""
    rules = [*_RULES, *(one for method in methods().values() for one in method.rules)]
    return [found for function, sections in rules if not sections & broken for found in function(config)]


def entries(config: Config) -> Iterator[tuple[str, PeerConfig]]:
    """Key and entry of every peer."""
    for index, peer in enumerate(config.peers):
        yield f"peers.{index}", peer


def heard_by(config: Config, index: int) -> list[int]:
    """The peers that a peer learns from."""
    me = config.peers[index]
    return [i for i, other in enumerate(config.peers) if i != index and hears(me.role, other.role, other.frozen)]


def learns_alone(peer: PeerConfig) -> bool:
    """Whether its loss has terms on own AEs or clean images that need no teacher."""
    c = peer.loss
    pairs = c.pair_kl or c.pair_mse or any(methods()[name].pairs for name in peer.methods)
    return bool((c.hard_weight and c.hard_own) or c.clean_weight or pairs)


# ---------------------------------------------------------------- the rules

# Words with a meaning where a peer is asked for: `mat_dist.load(run, peer="best")`, `peers.all.model=...`.
RESERVED_NAMES = ("all", "best", "ensemble", "last", "latest")


def as_fraction(value: float) -> str | None:
    """"8/255" for 8.0: what was meant by a radius in units of grey levels."""
    return f"{value:g}/255" if 1 < value <= 255 and float(value).is_integer() else None


@rule("threat", "data", "union")
def radius_is_known(config: Config) -> Iterator[ConfigError]:
    """A norm that is chosen without a radius has none of its own where nobody has set a standard."""
    for key, peer in entries(config):
        norm = peer.threat.norm
        if peer.threat.model_fields_set == {"norm"}:
            known = [f"; on {data} it is {eps:g}" for data, eps in known_norms()[norm].radii.items()]
            yield ConfigError(f"{norm} without a radius, and there is no standard one for {config.data.name}",
                              f"{key}.threat.norm",
                              f"give attack.eps too, or threat: {{norm: {norm}, eps: ...}}{''.join(known[:1])}")


@rule("threat")
def radius_fits_pixels(config: Config) -> Iterator[ConfigError]:
    """A linf radius above 1 covers every image, that of another norm may too."""
    for key, peer in entries(config):
        if peer.threat.eps > known_norms()[peer.threat.norm].largest:
            fraction = as_fraction(peer.threat.eps)
            how = f"write eps: {fraction}" if fraction else "write a radius for pixels in [0, 1], such as 8/255"
            yield ConfigError(f"a {peer.threat.norm} radius of {peer.threat.eps:g} is more than the whole range of a "
                              "pixel", f"{key}.threat.eps", how)


def _twice(config: Config, field: str, how: str) -> Iterator[ConfigError]:
    first: dict[object, str] = {}
    for key, peer in entries(config):
        value = getattr(peer, field)
        if value in first:
            yield ConfigError(f"{first[value]} and {key} have the same {field} {value}", f"{key}.{field}", how)
        first.setdefault(value, key)


@rule("peers")
def names_are_unique(config: Config) -> Iterator[ConfigError]:
    """A name means one peer."""
    for key, peer in entries(config):
        if peer.name in RESERVED_NAMES:
            yield ConfigError(f"the name {peer.name} has another meaning", f"{key}.name",
                              f"choose a name other than {', '.join(RESERVED_NAMES)}")
    yield from _twice(config, "name", "give each peer its own name")


@rule("peers")
def streams_are_unique(config: Config) -> Iterator[ConfigError]:
    """Two peers with one stream would draw the same weights and noise."""
    return _twice(config, "stream", "give each peer its own stream, or leave it out")


@rule("optim")
def milestones_rise(config: Config) -> Iterator[ConfigError]:
    """Milestones are increasing shares of the training."""
    for key, peer in entries(config):
        marks = (0, *peer.optim.milestones, 1)
        if any(a >= b for a, b in pairwise(marks)):
            shown = ", ".join(f"{m:g}" for m in peer.optim.milestones)
            yield ConfigError(f"milestones [{shown}] are not increasing shares between 0 and 1",
                              f"{key}.optim.milestones", "write shares of the training: [100/110, 105/110]")


@rule("optim", "loss", "train", "methods")
def warm_ups_end(config: Config) -> Iterator[ConfigError]:
    """Rates that never reach their peak, mutual terms that never begin, and peers with nothing to learn before."""
    epochs = config.train.epochs
    for key, peer in entries(config):
        loss, where = peer.loss, f"{key}.loss.warmup_epochs"
        if peer.optim.warmup_epochs >= epochs:
            rise = "rise of onecycle" if peer.optim.schedule == "onecycle" else "warm-up"
            yield ConfigError(f"the {rise} lasts {peer.optim.warmup_epochs:g} of {epochs} epochs",
                              f"{key}.optim.warmup_epochs", "make it shorter than train.epochs")
        if (loss.warmup_epochs or 0) >= epochs:
            yield ConfigError(f"the peer learns alone for {loss.warmup_epochs:g} of {epochs} epochs", where,
                              "make it shorter than train.epochs, or write preset: at")
        elif loss.warmup_epochs != 0 and not (loss.hard_weight or learns_alone(peer)) and not peer.frozen:
            yield ConfigError(f"a peer with preset {loss.preset} learns from teachers only, and is to warm up without "
                              "them", where, "write 0, or give hard_weight or clean_weight a weight")


@rule("train", "step")
def batch_can_be_split(config: Config) -> Iterator[ConfigError]:
    """Batch norm needs two images; microbatches are equal."""
    batch, parts = config.train.batch_size, config.train.accumulate
    if batch < 2:
        yield ConfigError("a batch of one image has no batch statistics", "train.batch_size", "write 2 or more")
    elif batch % parts:
        yield ConfigError(f"a batch of {batch} images cannot be cut into {parts} equal parts", "train.accumulate",
                          f"write a divisor of {batch}")
    elif batch // parts < 2:
        yield ConfigError("microbatches of one image have no batch statistics", "train.accumulate",
                          f"write at most {batch // 2}")


@rule("data", "train")
def data_fill_a_batch(config: Config) -> Iterator[ConfigError]:
    """An epoch has at least one step."""
    data, batch = config.data, config.train.batch_size
    real = real_images(batch, data.generated_share)
    if (data.generated is None) == (data.generated_share > 0) or not 0 < real <= batch - (data.generated_share > 0):
        found = "images" if data.generated else "no images"
        yield ConfigError(f"{found} in data.generated, {batch - real} of them in a batch of {batch}",
                          "data.generated_share", "name a file and a share that leaves one or more of both, such as "
                                                  "0.7; or neither")
    elif data.train_size is not None and data.train_size < real:
        yield ConfigError(f"{data.train_size} training images do not fill a batch of {real}", "data.train_size",
                          f"write {real} or more, or a smaller train.batch_size")


@rule("data", "loss", "attack", "union", "methods")
def mixed_labels_are_understood(config: Config) -> Iterable[ConfigError]:
    """CutMix gives an image two labels: what asks whether a prediction is right has no answer."""
    asking = [(lambda peer: not peer.frozen and peer.loss.kd_where != "all", "loss.kd_where", "kd_where: all"),
              (lambda peer: peer.attack.loss == "margin", "attack.loss", "attack.loss: ce"),
              *(method.one_label for method in methods().values() if method.one_label is not None)]
    return [ConfigError(f"{where} (preset {peer.loss.preset}) asks for one label per image, and cutmix mixes two",
                        f"{key}.{where}", f"write data.augment.cutmix: 0, or {use}")
            for asks, where, use in asking for key, peer in entries(config)
            if config.data.augment.cutmix and asks(peer)]


@rule("data")
def data_can_be_found(config: Config) -> Iterator[ConfigError]:
    """Data that are not embedded need a folder, a file or a download."""
    data = config.data
    if data.name in ("folder", "npz") and data.root is None:
        what = "a folder with train/<class>/ and test/<class>/" if data.name == "folder" else "an .npz file"
        yield ConfigError(f"{data.name} data without data.root", "data.root", f"write the path of {what}")
    elif data.root is None and data.name != "digits" and (
            data.name in ("cifar10", "cifar100", "svhn") or data.download):
        yield ConfigError(f"{data.name} data without data.root", "data.root",
                          "write the folder that holds the data, or where download: true may put them")


@rule("run", "data")
def paths_are_plain(config: Config) -> Iterable[ConfigError]:
    """No control characters or broken Unicode in paths: they break files, scripts and terminals."""
    paths = {"run.root": config.run.root, **{f"data.{name}": getattr(config.data, name)
                                             for name in ("root", "cache", "generated")}}
    return [ConfigError(f"{ascii(path)[:60]} holds a control character", key, "write a path of plain characters")
            for key, path in paths.items() if path is not None and re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", path)]


@rule("run", "comm")
def backend_fits_device(config: Config) -> Iterator[ConfigError]:
    """NCCL moves GPU memory only."""
    if config.run.device == "cpu" and config.comm.backend == "nccl":
        yield ConfigError("nccl needs GPUs, and run.device is cpu", "comm.backend", "write backend: auto or gloo")


@rule("attack", "loss")
def attack_can_start(config: Config) -> Iterable[ConfigError]:
    """KL to the clean prediction has gradient 0 at the clean image."""
    return [ConfigError("the attack loss kl_clean has no gradient at its start, the clean image", f"{key}.attack.start",
                        "write start: gaussian (TRADES) or uniform")
            for key, peer in entries(config) if peer.attack.loss == "kl_clean" and peer.attack.start == "zero"]


@rule("attack", "threat", "step", "union")
def n_fgsm_fits(config: Config) -> Iterator[ConfigError]:
    """N-FGSM is one step in linf, and its AEs leave the ball, to which shorter forms on the wire would cut them."""
    for key, peer in entries(config):
        if peer.attack.method != "n_fgsm":
            continue
        for found, fits, where, how in ((peer.attack.steps, 1, "attack.steps", "attack.steps: 1"),
                                        (peer.threat.norm, "linf", "threat.norm", "threat.norm: linf"),
                                        (peer.union.strategy, None, "union.strategy", "attack.method: pgd")):
            if found != fits:
                yield ConfigError(f"n_fgsm with {where} {found}", f"{key}.{where}", f"write {how}")
        if config.step.wire != "full":
            yield ConfigError("AEs of n_fgsm leave the ball, to which shorter ones are cut", "step.wire",
                              "write wire: full, or attack.method: pgd")


@rule("loss", "peers")
def some_term_counts(config: Config) -> Iterator[ConfigError]:
    """A loss without terms, and a cohort without labels and teachers, learn nothing."""
    training = [(key, peer) for key, peer in entries(config) if not peer.frozen]
    empty = [key for key, peer in training if not (
        learns_alone(peer) or peer.loss.hard_weight or peer.loss.kd_weight or peer.loss.kd_clean)]
    for key in empty:
        yield ConfigError("all terms of the loss have weight 0", f"{key}.loss",
                          "give hard_weight, clean_weight or kd_weight a weight")
    labelled = any(peer.loss.hard_weight or peer.loss.clean_weight or peer.methods for _, peer in training)
    if not empty and not labelled and len(training) == len(config.peers):
        yield ConfigError("no peer learns from labels", "peers.0.loss.hard_weight",
                          "give hard_weight or clean_weight a weight in at least one peer")


@rule("peers", "loss", "union")
def somebody_is_there_to_learn_from(config: Config) -> Iterator[ConfigError]:
    """Shares for other peers need other peers, shares for frozen teachers a frozen one."""
    how = "write loss.preset: at (or trades), or more peers"
    for index, (key, peer) in enumerate(entries(config)):
        loss, heard = peer.loss, heard_by(config, index)
        if peer.frozen:
            continue
        nobody = "there is one peer" if len(config.peers) == 1 else f"there is no peer that a {peer.role} learns from"
        makers = [i for i in heard if config.peers[i].role == "specialist" or config.peers[i].frozen]
        if peer.role == "generalist" and not makers and not peer.union.threats:
            yield ConfigError("a generalist without specialists", f"{key}.role",
                              "give other peers role: specialist, or the generalist union.threats of its own")
        elif not heard and (loss.kd_weight or loss.kd_clean):
            yield ConfigError(f"preset {loss.preset} distils from other peers, and {nobody}", f"{key}.loss.preset", how)
        elif not heard and loss.hard_weight and loss.hard_own != 1:
            yield ConfigError(f"preset {loss.preset} trains on other peers' examples, and {nobody}",
                              f"{key}.loss.preset", how)
        teachers = [i for i in heard if config.peers[i].frozen]
        if loss.teacher_set == "frozen" and (loss.kd_weight or loss.kd_clean) and not teachers:
            yield ConfigError(f"preset {loss.preset} learns from a frozen teacher, and there is none",
                              f"{key}.loss.teacher_set", "add a peer with frozen: true and init_from: RUN")


@rule("peers")
def frozen_peers_have_weights(config: Config) -> Iterator[ConfigError]:
    """A peer that does not train starts from trained weights; some peer trains."""
    for key, peer in entries(config):
        if peer.frozen and peer.init_from is None:
            yield ConfigError("a frozen peer without trained weights", f"{key}.frozen",
                              "give it init_from: RUN or a file")
    if all(peer.frozen for peer in config.peers):
        yield ConfigError("all peers are frozen", "peers.0.frozen", "let at least one train")


@rule("loss")
def single_images_have_a_divergence(config: Config) -> Iterable[ConfigError]:
    """Which images a teacher is listened to on is asked of the divergence alone."""
    return [ConfigError(f"kd_where {peer.loss.kd_where} with kd_loss {peer.loss.kd_loss}", f"{key}.loss.kd_loss",
                        "write kd_loss: kl")
            for key, peer in entries(config) if peer.loss.kd_where != "all" and peer.loss.kd_loss != "kl"]


@rule("step", "optim", "methods")
def averages_are_kept(config: Config) -> Iterable[ConfigError]:
    """Teachers with averaged weights keep them, with running statistics that do not wait for a checkpoint."""
    kept = {True: ("methods.swa, whose averages have norm statistics in checkpoints alone", "leave methods.swa out and "
                   "write optim.ema_decay: 0.999, or step.teachers: raw"),
            False: ("the peer keeps none", "write a decay such as 0.999, or step.teachers: raw")}
    return [ConfigError(f"teachers with averaged weights, and {what}", f"{key}.optim.ema_decay", how)
            for key, peer in entries(config)
            if config.step.teachers == "ema" and peer.optim.ema_decay is None and not peer.frozen
            for what, how in [kept[peer.averages]]]


@rule("loss", "peers", "union", "threat")
def teachers_know_the_view(config: Config) -> Iterator[ConfigError]:
    """With `teacher_set: owner` nobody teaches on own examples (their owner is the student), with `owner` and `expert`
    nobody on clean images, and experts defend the norm of every view that is distilled."""
    for index, (key, peer) in enumerate(entries(config)):
        kind, loss, where = peer.loss.teacher_set, peer.loss, f"{key}.loss.teacher_set"
        if kind not in ("owner", "expert") or len(config.peers) == 1 or peer.frozen:
            continue
        for name, what in (("kd_own", "own examples"), ("kd_clean", "clean images")):
            if getattr(loss, name) and ((name == "kd_clean") or (kind == "owner" and loss.kd_weight)):
                yield ConfigError(f"teacher_set {kind} leaves no teacher on {what}, {name} is "
                                  f"{getattr(loss, name):g}", where, f"write {name}: 0, or teacher_set: all")
        if kind == "owner" or not loss.kd_weight:
            continue
        makers = _distilled_makers(config, index)
        experts = {config.peers[i].threat.norm for i in heard_by(config, index)}
        mixed = [str(maker.name) for maker in makers
                 if (strategy := strategies().get(maker.union.strategy or "")) and not strategy.each]
        if mixed:
            yield ConfigError(f"teacher_set expert, and the AEs of {', '.join(mixed)} are of several norms at once",
                              where, "write union.strategy: avg or max there, or teacher_set: all")
        elif experts and (missing := {norm for maker in makers for norm in _view_norms(maker)} - experts):
            norms = ", ".join(sorted(missing))
            yield ConfigError(f"preset {loss.preset} with teacher_set expert, and no peer that {peer.name} learns from "
                              f"defends {norms}", where, f"add a peer with role: specialist for each of {norms}, or "
                                                         "leave the norm out")


def _distilled_makers(config: Config, index: int) -> list[PeerConfig]:
    """Whose views a peer distils on: its own, and, unless kd_own is 1, those of the others."""
    peer = config.peers[index]
    others = [config.peers[i] for i in heard_by(config, index)] if peer.loss.kd_own != 1 else []
    return [peer] * bool(peer.loss.kd_own) + others


def _view_norms(peer: PeerConfig) -> set[str]:
    """Norms that a peer makes views for."""
    strategy = strategies().get(peer.union.strategy or "")
    return {norm for norm, _ in peer.union.balls if strategy and strategy.each} or {peer.threat.norm}


def _listens(student: PeerConfig, norm: str) -> bool:
    """Whether a peer that hears another one, whose norm is `norm`, may learn from it: experts are asked for theirs."""
    loss = student.loss
    return loss.teacher_set != "expert" or loss.hard_own != 1 or loss.kd_own != 1 or norm in _view_norms(student)


def config_warnings(config: Config) -> list[str]:
    """What is allowed but unusual, one line each; with the names of the peers where it is not all of them."""
    texts: dict[str, list[str]] = {}

    def note(text: str, peer: PeerConfig) -> None:
        texts.setdefault(text, []).append(peer.name or "")

    for index, peer in enumerate(config.peers):
        for text in () if peer.frozen else (*_idle(peer, index, config), *_weak(peer, index)):
            note(text, peer)
        eps, size = peer.threat.eps, peer.attack.step_size
        meant = as_fraction(size) if size is not None else None
        if peer.loss.label_smoothing and not peer.frozen and not peer.loss.clean_weight and not peer.loss.hard_weight:
            note(f"loss.label_smoothing: preset {peer.loss.preset} has no cross-entropy that takes it", peer)
        if "ramp" in peer.methods and peer.union.strategy != "ramp":
            note("methods.ramp does nothing without union.strategy ramp", peer)
        if size is not None and size > 2 * eps:
            note(f"attack.step_size {size:g} is more than 2 eps = {2 * eps:g}" + (f"; {meant}?" if meant else ""), peer)
    found = [text if len(names) == len(config.peers) else f"{text} ({', '.join(names)})"
             for text, names in texts.items()]
    if config.step.teachers == "ema" and not any(peer.loss.kd_weight or peer.loss.kd_clean for peer in config.peers):
        found.append("step.teachers ema does nothing where nobody learns a teacher's opinion")
    augment = config.data.augment
    for name in {peer.loss.preset for peer in config.peers}:
        preset, users = presets()[name], sum(peer.loss.preset == name for peer in config.peers)
        if len(preset.parts) > 1 and users != len(config.peers):
            found.append(f"loss.preset {name} is meant for all peers: they alternate between its kinds by index")
        elif len(preset.parts) > 1 and users != len(preset.parts):
            found.append(f"loss.preset {name} was published for {len(preset.parts)} peers; here kinds alternate and "
                         "distillation is the mean")
    if augment.cutmix and not any(peer.averages for peer in config.peers):
        found.append("data.augment.cutmix helps adversarial training with averaged weights (Rebuffi et al., NeurIPS "
                     "2021), and no peer has optim.ema_decay or methods.swa")
    if augment.idbh != "off" and (augment.pad or augment.random_resized_crop):
        found.append(f"data.augment.idbh {augment.idbh} crops and erases itself; pad or random_resized_crop comes on "
                     "top")
    if config.data.name == "folder" and config.data.image_size is None:
        found.append("data.image_size is not set: all images of the folder must have one size")
    found += [f"eval.{name} does nothing with eval.attack cr, which has steps of its own"
              for name in ("steps", "test_steps") if config.eval.attack == "cr"
              and getattr(config.eval, name) not in (0, EvalConfig.model_fields[name].default)]
    if config.data.name in ("digits", "svhn") and augment.flip:
        found.append(f"data.augment.flip mirrors the digits of {config.data.name}")
    return [*found, *_role_warnings(config)]


def _idle(peer: PeerConfig, index: int, config: Config) -> Iterator[str]:
    """Settings of the loss and of averages that change nothing."""
    loss = peer.loss
    epochs = config.train.epochs
    plain = fill_loss(LossConfig(preset=loss.preset), index, len(config.peers), peer.role, peer.union)
    distils = bool(loss.kd_weight or loss.kd_clean)
    used = {"hard_own": loss.hard_weight,
            **dict.fromkeys(("kd_loss", "kd_where", "teacher_input", "teacher_set"), distils),
            "temperature": loss.pair_kl or (distils and loss.kd_loss == "kl"),
            "warmup_epochs": distils or (loss.hard_weight and loss.hard_own != 1)}
    for name, counts in used.items():
        if not counts and getattr(loss, name) != getattr(plain, name):
            yield f"loss.{name} does nothing with these weights of the loss (preset {loss.preset})"
    if getattr(peer.methods.get("swa"), "start", 0.0) * epochs > epochs - 1:
        yield f"methods.swa does nothing: from its start on there is one end of {epochs} epochs to average"


def _weak(peer: PeerConfig, index: int) -> Iterator[str]:
    """Settings of the attack that change nothing, and steps that are too short for the ball."""
    loss, attack, eps = peer.loss, peer.attack, peer.threat.eps
    if attack.method == "n_fgsm" and attack.start != fill_attack(AttackConfig(), loss.preset, index, peer.threat).start:
        yield "attack.start does nothing with n_fgsm, which has a noise of its own"
    if peer.union.strategy == "msd" and attack.method != "pgd":
        yield (f"attack.method {attack.method} beside union.strategy msd sets nothing but the length of all its steps "
               "to that of a first one: write attack.method pgd, attack.step_size null")
    elif attack.method == "apgd" and (attack.step_size or eps) < eps:
        yield (f"attack.step_size {attack.step_size:g} is the first step of APGD, which never grows: shorter than eps "
               f"= {eps:g} it is weak; null is the published length")
    elif attack.method == "pgd" and "warm_start" not in peer.methods and attack.steps * (attack.step_size or eps) < eps:
        yield (f"attack.steps {attack.steps} of attack.step_size {attack.step_size:g} are shorter than eps = {eps:g}; "
               "attack.step_size null fits the steps to the ball")


def _role_warnings(config: Config) -> Iterator[str]:
    """What is unusual in who learns from whom."""
    deaf = [str(peer.name) for peer in config.peers
            if peer.role == "generalist" and not peer.frozen and peer.union.threats is None]
    if deaf:
        yield (f"{', '.join(deaf)}: a generalist without AEs of its own stays open to those made against it (5 % on "
               "the union where one with them had 54 %, docs/unions.md); write union.threats and loss: mat_union, or "
               "union.threats and union.strategy: msd with attack.method: pgd")
    unheard = [str(peer.name) for index, peer in enumerate(config.peers) if peer.role == "specialist" and not any(
        index in heard_by(config, i) and _listens(other, peer.threat.norm) for i, other in enumerate(config.peers))]
    if unheard and not any(peer.frozen for peer in config.peers):
        yield (f"{', '.join(unheard)}: a specialist that nobody learns from; role: generalist is the peer that does, "
               "with teacher_set expert (mat_union) where its union.threats have the norm")
    fixed = [(peer.init_from or peer.stream, peer.model_copy(update={"name": "", "stream": 0}))
             for peer in config.peers if peer.attack.start == "zero" and not peer.frozen]
    if any(one in fixed[:n] for n, one in enumerate(fixed)):
        yield ("peers with equal settings and initial weights attack from the clean image: without dropout they stay "
               "equal; write attack.start: uniform")


@rule("eval", "threat", "union", "peers")
def evaluations_attack_every_threat(config: Config) -> Iterator[ConfigError]:
    """Constraint relaxation is for linf."""
    norms = {norm for peer in config.peers for norm in (peer.threat.norm, *(norm for norm, _ in peer.union.balls))}
    if config.eval.attack == "cr" and norms != {"linf"}:
        yield ConfigError(f"eval.attack cr beside {', '.join(sorted(norms - {'linf'}))}: it is for linf", "eval.attack",
                          "write pgd")
