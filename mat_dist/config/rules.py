"""Rules between settings but those of the mutual loss. Data and model names are not checked here: a plug-in may
register more.
"""

from __future__ import annotations

import operator
import re

from mat_dist.config.fields import real_images
from mat_dist.config.registry import entries, rule
from mat_dist.config.rules_sharing import sharing_warnings
from mat_dist.config.schema import Config, PeerConfig
from mat_dist.errors import ConfigError

# Words with a meaning where a peer is asked for: `mat_dist.load(run, peer="best")`, `peers.all.model=...`.
RESERVED_NAMES = ("all", "best", "ensemble", "last", "latest")


def as_fraction(value: float) -> str | None:
    """"8/255" for 8.0: what was meant by a radius in units of grey levels."""
    return f"{value:g}/255" if 1 < value <= 255 and float(value).is_integer() else None


@rule("threat")
def radius_fits_pixels(config: Config) -> list[ConfigError]:
    """A linf radius above 1 covers every image."""
    found = []
    for key, peer in entries(config):
        if peer.threat.norm == "linf" and peer.threat.eps > 1:
            fraction = as_fraction(peer.threat.eps)
            how = f"write eps: {fraction}" if fraction else "write a radius for pixels in [0, 1], such as 8/255"
            found.append(ConfigError(f"a linf radius of {peer.threat.eps:g} is more than the whole range of a pixel",
                                     f"{key}.threat.eps", how))
    return found


def _twice(config: Config, field: str, how: str) -> list[ConfigError]:
    first: dict[object, str] = {}
    found = []
    for key, peer in entries(config):
        value = getattr(peer, field)
        if value in first:
            found.append(ConfigError(f"{first[value]} and {key} have the same {field} {value}", f"{key}.{field}", how))
        first.setdefault(value, key)
    return found


@rule("peers")
def names_are_unique(config: Config) -> list[ConfigError]:
    """A name means one peer."""
    reserved = [ConfigError(f"the name {peer.name} has another meaning", f"{key}.name",
                            f"choose a name other than {', '.join(RESERVED_NAMES)}")
                for key, peer in entries(config) if peer.name in RESERVED_NAMES]
    return reserved + _twice(config, "name", "give each peer its own name")


@rule("peers")
def streams_are_unique(config: Config) -> list[ConfigError]:
    """Two peers with one stream would draw the same weights and noise."""
    return _twice(config, "stream", "give each peer its own stream, or leave it out")


@rule("optim", "train")
def schedule_fits_training(config: Config) -> list[ConfigError]:
    """Warm-up ends within the training; milestones are increasing shares of it."""
    found = []
    for key, peer in entries(config):
        o = peer.optim
        if o.warmup_epochs >= config.train.epochs:
            rise = "rise of onecycle" if o.schedule == "onecycle" else "warm-up"
            found.append(ConfigError(f"the {rise} lasts {o.warmup_epochs:g} of {config.train.epochs} epochs",
                                     f"{key}.optim.warmup_epochs", "make it shorter than train.epochs"))
        inside = all(0 < m < 1 for m in o.milestones)
        if not inside or any(a >= b for a, b in zip(o.milestones, o.milestones[1:], strict=False)):
            shown = ", ".join(f"{m:g}" for m in o.milestones)
            found.append(ConfigError(f"milestones [{shown}] are not increasing shares between 0 and 1",
                                     f"{key}.optim.milestones", "write shares of the training: [100/110, 105/110]"))
        if o.nesterov and o.momentum == 0:
            found.append(ConfigError("nesterov without momentum", f"{key}.optim.nesterov",
                                     "give optim.momentum a value such as 0.9, or nesterov: false"))
    return found


@rule("optim")
def one_average(config: Config) -> list[ConfigError]:
    """A peer keeps one average of its weights."""
    return [ConfigError("two averages of the weights, ema_decay and swa_start", f"{key}.optim.swa_start",
                        "write ema_decay: null, or leave swa_start out")
            for key, peer in entries(config) if peer.optim.ema_decay is not None and peer.optim.swa_start is not None]


@rule("train", "step")
def batch_can_be_split(config: Config) -> list[ConfigError]:
    """Batch norm needs two images; microbatches are equal."""
    batch, parts = config.train.batch_size, config.step.microbatches
    if batch < 2:
        return [ConfigError("a batch of one image has no batch statistics", "train.batch_size", "write 2 or more")]
    if batch % parts:
        return [ConfigError(f"a batch of {batch} images cannot be cut into {parts} equal parts", "step.microbatches",
                            f"write a divisor of {batch}")]
    if batch // parts < 2:
        return [ConfigError("microbatches of one image have no batch statistics", "step.microbatches",
                            f"write at most {batch // 2}")]
    return []


@rule("step")
def joint_norms_need_all_graphs(config: Config) -> list[ConfigError]:
    """One concatenated forward cannot be recomputed a source at a time."""
    if config.step.bn == "joint" and config.step.memory == "recompute":
        return [ConfigError("bn joint forwards all sources at once, memory recompute one by one", "step.bn",
                            "write bn: separate, or memory: keep with more microbatches")]
    return []


@rule("data", "train")
def data_fill_a_batch(config: Config) -> list[ConfigError]:
    """An epoch has at least one step."""
    data, batch = config.data, config.train.batch_size
    real = real_images(batch, data.generated_share)
    if (data.generated is None) == (data.generated_share > 0) or not 0 < real <= batch - (data.generated_share > 0):
        found = "images" if data.generated else "no images"
        return [ConfigError(f"{found} in data.generated, {batch - real} of them in a batch of {batch}",
                            "data.generated_share", "name a file and a share that leaves one or more of both, such as "
                                                    "0.7; or neither")]
    if data.train_size is None or data.train_size >= real:
        return []
    return [ConfigError(f"{data.train_size} training images do not fill a batch of {real}", "data.train_size",
                        f"write {real} or more, or a smaller train.batch_size")]


@rule("data")
def idbh_crops_and_erases_itself(config: Config) -> list[ConfigError]:
    """IDBH with another crop or another hidden square is no longer what was published."""
    augment = config.data.augment
    both = [name for name in ("pad", "random_resized_crop", "cutout") if getattr(augment, name)]
    if augment.idbh == "off" or not both:
        return []
    return [ConfigError(f"idbh {augment.idbh} crops and erases itself, {both[0]} would come on top",
                        f"data.augment.{both[0]}", f"write {both[0]}: 0, or idbh: off")]


@rule("data", "loss", "attack", "union")
def mixed_labels_are_understood(config: Config) -> list[ConfigError]:
    """CutMix gives an image two labels: what asks whether a prediction is right has no answer."""
    found = []
    for key, peer in entries(config) if config.data.augment.cutmix else ():
        loss = peer.loss
        asks = (("loss.hard_loss", loss.hard_loss == "bce", "ce"), ("loss.mart_beta", bool(loss.mart_beta), "0"),
                ("loss.gate", bool(loss.gate), "0"), ("loss.kd_where", loss.kd_where != "all", "all"),
                ("attack.loss", peer.attack.loss == "margin", "ce"),
                ("union.strategy", peer.union.strategy in ("eat", "ramp"), "max"))
        unfit = [(name, use) for name, bad, use in asks if bad and not (peer.frozen and name != "attack.loss")]
        if unfit:
            listed = ", ".join(f"{name} {operator.attrgetter(name)(peer)}" for name, _ in unfit)
            instead = ", ".join(f"{name}: {use}" for name, use in unfit)
            found.append(ConfigError(f"{listed} (preset {loss.preset}) asks for one label per image, and cutmix mixes "
                                     "two", f"{key}.{unfit[0][0]}", f"write data.augment.cutmix: 0, or {instead}"))
    return found


@rule("data")
def data_can_be_found(config: Config) -> list[ConfigError]:
    """Data that are not embedded need a folder, a file or a download."""
    data = config.data
    if data.name in ("folder", "npz") and data.root is None:
        what = "a folder with train/<class>/ and test/<class>/" if data.name == "folder" else "an .npz file"
        return [ConfigError(f"{data.name} data without data.root", "data.root", f"write the path of {what}")]
    if data.name in ("folder", "npz", "digits") and data.download:
        return [ConfigError(f"{data.name} data cannot be downloaded", "data.download", "write download: false")]
    if data.root is None and (data.name in ("cifar10", "cifar100", "svhn") or data.download):
        return [ConfigError(f"{data.name} data without data.root", "data.root",
                            "write the folder that holds the data, or where download: true may put them")]
    return []


@rule("run", "data")
def paths_are_plain(config: Config) -> list[ConfigError]:
    """No control characters or broken Unicode in paths: they break files, scripts and terminals."""
    paths = {"run.root": config.run.root, **{f"data.{name}": getattr(config.data, name)
                                             for name in ("root", "cache", "generated")}}
    return [ConfigError(f"{ascii(path)[:60]} holds a control character", key, "write a path of plain characters")
            for key, path in paths.items() if path is not None and re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", path)]


@rule("run", "comm")
def backend_fits_device(config: Config) -> list[ConfigError]:
    """NCCL moves GPU memory only."""
    if config.run.device == "cpu" and config.comm.backend == "nccl":
        return [ConfigError("nccl needs GPUs, and run.device is cpu", "comm.backend", "write backend: auto or gloo")]
    return []


def _grouped(config: Config, texts: dict[str, list[str]]) -> list[str]:
    return [text if len(names) == len(config.peers) else f"{text} ({', '.join(names)})"
            for text, names in texts.items()]


def config_warnings(config: Config) -> list[str]:
    """What is allowed but unusual, one line each; with the names of the peers where it is not all of them."""
    texts: dict[str, list[str]] = {}

    def note(text: str, peer: PeerConfig) -> None:
        texts.setdefault(text, []).append(peer.name or "")

    for peer in config.peers:
        eps, size = peer.threat.eps, peer.attack.step_size
        meant = as_fraction(size) if size is not None else None
        if size is not None and size > 2 * eps:
            note(f"attack.step_size {size:g} is more than 2 eps = {2 * eps:g}" + (f"; {meant}?" if meant else ""), peer)
        if config.eval.step_size is not None and config.eval.step_size > 2 * eps:
            note(f"eval.step_size {config.eval.step_size:g} is more than 2 eps = {2 * eps:g}", peer)
    found = _grouped(config, texts)
    cat = [peer for peer in config.peers if peer.loss.preset == "cat"]
    if cat and len(cat) != len(config.peers):
        found.append("loss.preset cat is meant for all peers: they alternate between TRADES and ALP type by index")
    elif cat and len(cat) != 2:
        found.append("loss.preset cat was published for 2 peers; here types alternate and distillation is the mean")
    if config.data.augment.cutmix and not any(peer.optim.averages for peer in config.peers):
        found.append("data.augment.cutmix helps adversarial training with averaged weights (Rebuffi et al., NeurIPS "
                     "2021), and no peer has optim.ema_decay or swa_start")
    if config.data.name == "folder" and config.data.image_size is None:
        found.append("data.image_size is not set: all images of the folder must have one size")
    if config.data.name in ("digits", "svhn") and config.data.augment.flip:
        found.append(f"data.augment.flip mirrors the digits of {config.data.name}")
    return found + sharing_warnings(config)
