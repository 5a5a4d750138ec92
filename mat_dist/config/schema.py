"""What can be set, with units, ranges and defaults. Frozen pydantic models; unknown keys are errors.

The file is also the source of `--help` and of `configs/schema.json`. Rules between fields of one section
stand beside the section; rules between sections in `rules.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from mat_dist.config.fields import Arguments, Integer, Number, Section, Written, parse_threats
from mat_dist.config.methods import Methods, Registered, attack_losses, attack_methods, methods, presets, strategies
from mat_dist.config.norms import known_norms

MAX_PEERS = 256  # a bound for typing errors; each peer is a model


class RunConfig(Section):
    """Where a run writes, and on what it runs."""

    root: str = Field("runs", description="folder that holds all runs", min_length=1)
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="name of the run folder; default: config name and UTC time, or the SLURM job or torchrun id")
    seed: Integer = Field(0, ge=0, lt=2**63, description="seed of every random draw")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs where there are any, else the CPU")
    threads: Integer = Field(1, ge=1, le=1024, description="CPU threads per rank; bitwise equality across rank "
                                                           "counts holds at 1")
    resume: Literal["auto", "must", "never"] = Field(
        "auto", description="auto: continue the folder's newest complete checkpoint if there is one; must: fail if "
                            "there is none; never: refuse a folder that exists")
    deterministic: bool = Field(False, description="ask the GPU libraries for deterministic kernels (slower)")


class CommConfig(Section):
    """How ranks talk."""

    backend: Literal["auto", "gloo", "nccl"] = Field(
        "auto", description="auto: nccl on GPUs, gloo on CPUs; gloo with GPUs stages through host memory and lets "
                            "ranks share a GPU")
    timeout: Number = Field(600.0, gt=0, le=86400, description="seconds after which a silent rank is given up")


class AugmentConfig(Section):
    """Training augmentation, done in batches on the device with keyed randomness."""

    pad: Integer = Field(0, ge=0, le=64, description="zero-pad by this many pixels and crop back (CIFAR: 4)")
    flip: bool = Field(False, description="mirror left-right with probability 1/2")
    random_resized_crop: Number = Field(0.0, ge=0, le=1, description="smallest area share of a random resized crop "
                                                                     "(ImageNet: 0.08); 0 is off")
    idbh: Literal["off", "weak", "strong"] = Field(
        "off", description="CropShift, a colour or shape transform, and random erasing of half of the images (weak) or "
                           "all; takes the place of crops")
    cutmix: Number = Field(0.0, ge=0, le=1, description="probability of an image to get a window of another one, and "
                                                        "of its label as much as its area (CutMix; published: 0.5; in "
                                                        "adversarial training with averaged weights: 1); 0 is off")


class DataConfig(Section):
    """The images."""

    name: str = Field("digits", min_length=1, description="digits (embedded), fashion_mnist, cifar10, cifar100, svhn, "
                                                          "folder, npz, or a name that a plug-in registered")
    root: str | None = Field(None, description="folder (npz: file) that holds the data set")
    download: bool = Field(False, description="fetch the data set into data.root if it is not there")
    image_size: Integer | None = Field(None, ge=4, le=1024, description="folder: resize to this many pixels a side")
    train_size: Integer | None = Field(None, ge=1, description="use a stratified subset of this many training images")
    val_size: Integer | None = Field(None, ge=1, description="images held out of train; default max(2 %, 500), at "
                                                             "most 20 %")
    test_size: Integer | None = Field(None, ge=1, description="use a stratified subset of this many test images")
    residency: Literal["auto", "device", "host", "mmap"] = Field(
        "auto", description="where the uint8 images lie: in device memory, in host memory, or in one file per node "
                            "that all ranks map; auto chooses by size")
    cache: str | None = Field(None, description="folder of decoded-image caches; default: ~/.cache/mat_dist")
    on_bad: Literal["stop", "skip"] = Field("stop", description="an image file that cannot be read: stop, or leave the "
                                                                "sample out on all ranks (a few at most)")
    generated: str | None = Field(None, description="uncompressed .npz of generated training images: image, uint8 "
                                                    "(N, H, W, C), and label")
    generated_share: Number = Field(0.0, ge=0, lt=1, description="their share of each batch (DM-AT: 0.7); an epoch is "
                                                                 "a pass over the real images")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="training augmentation")


class ModelConfig(Section):
    """A classifier over [0, 1] images; normalisation is its first layer."""

    name: str = Field(
        "tiny_cnn", min_length=1, description="tiny_cnn, small_cnn, resnet18, preact_resnet18, wrn_28_10, other depths "
                                              "of these, mobilenet_v2, torchvision/<name>, timm/<name>, "
                                              "robustbench/<entry>, or a plug-in's name")
    width: Number = Field(1.0, gt=0, le=16, description="factor on the number of channels")
    activation: Literal["relu", "silu", "softplus"] | None = Field(
        None, description="default: the architecture's own (relu)")
    norm: Literal["batch", "group"] | None = Field(
        None, description="norm layer; default: the architecture's own (batch)")


class ThreatConfig(Section):
    """The norm ball, intersected with [0, 1], that a peer defends against."""

    norm: Annotated[str, Registered(known_norms)] = Field("linf", description="norm of the ball")
    eps: Number = Field(0.1, ge=1e-6, le=1e4, description="radius for images in [0, 1], e.g. 8/255; where none is "
                                                       "given, the standard one of the data set")


class AttackConfig(Section):
    """How a peer makes its adversarial examples in training."""

    method: Annotated[str, Registered(attack_methods)] = Field(
        "pgd", description="pgd: equal steps, the last point counts; apgd: Auto-PGD sets its own steps, the best point "
                           "counts; n_fgsm: one step from noise of 2 eps, not cut to the ball (linf, steps: 1); free: "
                           "one step a replay along the image gradient that learning gives (steps: 1, train.replays)")
    steps: Integer = Field(10, ge=1, le=1000, description="gradient steps; 1 with a uniform start is FGSM-RS")
    step_size: Number | None = Field(None, gt=0, le=1e5, description="length of a step; default 2.5 eps / steps, for "
                                                                     "one step 1.25 eps, n_fgsm and free eps; apgd: "
                                                                     "of the first step, 2 eps, for l1 eps")
    start: Literal["uniform", "gaussian", "zero"] | None = Field(
        None, description="start noise; gaussian is TRADES' 0.001 normal; default: the preset's (uniform)")
    loss: Annotated[str, Registered(attack_losses)] | None = Field(
        None, description="what the attack raises: cross-entropy (ce), KL to the own clean prediction (kl_clean, "
                          "TRADES) or to the teachers' (kl_teacher, RSLAD), or the CW margin (margin); default: the "
                          "preset's (ce)")


class UnionConfig(Section):
    """How one peer trains against several threats at once. Formulas: docs/unions.md."""

    strategy: Annotated[str, Registered(strategies)] | None = Field(
        None, description="learn from all threats evenly (avg); from each image's worst one (max); from one drawn per "
                          "step (random, SAT); from linf or l1, the less robust one more often (eat, E-AT); from the "
                          "steepest over the threats in each attack step (msd); max with paired logits (ramp). A "
                          "generalist without threats of its own learns so from its specialists' AEs (avg, max, ramp)")
    threats: Annotated[str, Written(parse_threats, "linf:8/255,l2:1/2,l1:12")] | None = Field(
        None, description="norm:eps of each, for AEs of its own; the first one is the peer's threat")

    @property
    def balls(self) -> list[tuple[str, float]]:
        """Norm and radius of each threat."""
        return parse_threats(self.threats) if self.threats else []


class LossConfig(Section):
    """The mutual loss of one peer; empty coefficients take the preset's value. Formula: docs/loss.md."""

    preset: Annotated[str, Registered(presets)] = Field("mat", description="named set of coefficients")
    hard_weight: Number | None = Field(None, ge=0, description="weight of cross-entropy on AEs; default 1 - kd_weight")
    hard_own: Number | None = Field(None, ge=0, le=1, description="share of hard_weight on own AEs, the rest is spread "
                                                                  "over peers' AEs")
    clean_weight: Number | None = Field(None, ge=0, description="weight of cross-entropy on clean images")
    kd_weight: Number | None = Field(None, ge=0, le=1, description="weight of distillation from peers on AEs")
    kd_own: Number | None = Field(None, ge=0, le=1, description="share of kd_weight on own AEs, the rest is spread "
                                                                "over peers' AEs; default an even share (with "
                                                                "teacher_set owner: 0)")
    kd_clean: Number | None = Field(None, ge=0, le=1, description="weight of distillation on clean images (RSLAD)")
    kd_loss: Literal["kl", "mse"] | None = Field(
        None, description="divergence of softened predictions, or mean squared difference of logits (LBGAT)")
    kd_where: Literal["all", "teacher_right", "student_wrong"] | None = Field(
        None, description="images on which a teacher is listened to: all; those that it labels correctly; of these "
                          "those that the student gets wrong")
    temperature: Number | None = Field(None, gt=0, le=1000, description="softmax temperature of distillation and of "
                                                                        "pair_kl (T); both count T squared times")
    teacher_input: Literal["same_ae", "own_ae", "clean"] | None = Field(
        None, description="what a teacher looks at: what the student sees, the teacher's own AE, or the clean image")
    teacher_set: Literal["all", "owner", "expert", "frozen"] | None = Field(
        None, description="all other peers; only the peer that made the AE; only peers whose own threat has the norm "
                          "that the AE was made for; or only peers that do not train")
    pair_kl: Number | None = Field(None, ge=0, description="weight of KL(clean prediction || own-AE prediction) "
                                                           "(TRADES: beta)")
    pair_mse: Number | None = Field(None, ge=0, description="weight of the mean squared difference between clean and "
                                                            "own-AE logits (ALP)")
    label_smoothing: Number | None = Field(None, ge=0, lt=1, description="label smoothing of the cross-entropies on "
                                                                         "AEs and clean images")
    warmup_epochs: Number | None = Field(None, ge=0, description="epochs in which the peer learns alone: no "
                                                                 "distillation, hard labels on own AEs")


class OptimConfig(Section):
    """An optimizer of torch.optim and a schedule that is a pure function of the step."""

    name: str = Field("sgd", pattern=r"^[A-Za-z]\w{0,31}$", description="sgd, adamw, or the name of a class of "
                                                                        "torch.optim, such as RMSprop")
    lr: Number = Field(0.1, gt=0, le=100, description="peak learning rate")
    weight_decay: Number = Field(5e-4, ge=0, le=1, description="weight decay")
    args: Arguments = Field(
        default_factory=dict, description="further arguments of the class, such as {nesterov: true} or {betas: [0.9, "
                                          "0.95]}, or one by one: optim.args.momentum=0.8; sgd has momentum 0.9 where "
                                          "they say nothing else. Ours: decay_norm_bias: false spares norm layers and "
                                          "biases weight decay, layer_decay: 0.75 slows lower layers of timm")
    schedule: Literal["constant", "piecewise", "cosine", "onecycle"] = Field(
        "piecewise", description="learning-rate schedule")
    milestones: tuple[Number, ...] = Field((0.5, 0.75), description="piecewise: shares of the training after which the "
                                                                    "rate is divided by 10")
    warmup_epochs: Number = Field(0.0, ge=0, description="linear warm-up from 0; onecycle: length of the rise "
                                                         "(0: 30 % of the training)")
    clip_norm: Number | None = Field(None, gt=0, description="clip each peer's gradient to this L2 norm")
    ema_decay: Number | None = Field(None, gt=0, lt=1, description="decay of the averaged weights, at most (1 + t) / "
                                                                   "(10 + t) after t steps; empty: none are kept")


class PeerConfig(Section):
    """One peer; what it does not set comes from the sections of the same name at the top level."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$", description="default: peer<index>")
    stream: Integer | None = Field(None, ge=0, lt=2**63, description="number that keys this peer's random streams; "
                                                                     "default: its index")
    role: Literal["peer", "specialist", "generalist"] = Field(
        "peer", description="a peer learns from all others, a generalist from all but generalists, a specialist from "
                            "all but specialists")
    frozen: bool = Field(False, description="do not train it: a teacher with the weights of init_from")
    init_from: str | None = Field(None, description="start from the weights of a run: its folder RUN (its best peer) "
                                                    "or RUN:PEER; of a file: FILE.pt or FILE.pt:ENTRY; of a hub: "
                                                    "hf:ORG/NAME; or from what torchvision or timm offer: pretrained; "
                                                    "pretrained:SOURCE has a new last layer where classes differ")
    union: UnionConfig = Field(default_factory=UnionConfig, description="several threats at once")
    model: ModelConfig = Field(default_factory=ModelConfig, description="architecture (a name alone is enough)")
    threat: ThreatConfig = Field(default_factory=ThreatConfig, description="norm ball (a norm alone is enough)")
    attack: AttackConfig = Field(default_factory=AttackConfig, description="training attack")
    loss: LossConfig = Field(default_factory=LossConfig, description="mutual loss (a preset name alone is enough)")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="optimizer and schedule")
    methods: Methods = Field(default_factory=dict, description="methods that are added to the training, a section each")

    @property
    def averages(self) -> bool:
        """Whether averaged weights are kept."""
        return self.optim.ema_decay is not None or "swa" in self.methods

    @property
    def learns_aes(self) -> bool:
        """Whether a complete entry has a term on AEs, of a method too; LBGAT's net of clean images has none."""
        loss, couples = self.loss, any(methods()[name].pairs for name in self.methods)
        return bool(loss.hard_weight or loss.kd_weight or loss.pair_kl or loss.pair_mse or couples)


class StepConfig(Section):
    """How a step is computed; of these `teachers` changes the algorithm."""

    precision: Literal["fp32", "tf32", "ieee", "bf16", "fp16", "fp64"] = Field(
        "fp32", description="arithmetic of the models; AEs and losses are fp32 (fp64 with fp64). On GPUs fp32 is "
                            "torch's default, TF32 in convolutions alone; tf32: in products too; ieee: nowhere. fp16: "
                            "with scaled losses; a step that overflows is left out")
    memory: Literal["keep", "recompute"] = Field(
        "keep", description="keep the graphs of all sources (fast), or gather logits without graph and recompute one "
                            "source at a time (ImageNet size, many peers)")
    engine: Literal["auto", "eager", "graph", "compile"] = Field(
        "auto", description="how a step runs: operation by operation; graph: recorded once as CUDA graphs, which run "
                            "without waiting for the host, and checked against eager steps; compile: the passes of "
                            "the models compiled (torch.compile, a minute at start), and recorded on GPUs; auto: graph "
                            "on GPUs, eager elsewhere. What cannot be recorded or compiled runs eagerly, with a note")
    wire: Literal["full", "fp16", "int8"] = Field(
        "full", description="how AEs travel: all bits, or their perturbation in fewer, for slow networks; the sender "
                            "trains on the shortened ones too, where others need them")
    teachers: Literal["raw", "ema"] = Field("raw", description="peers teach with their weights of this step, or with "
                                                               "their averaged ones in eval mode")
    on_nonfinite: Literal["abort", "skip"] = Field(
        "abort", description="after NaN or infinity in a peer, no peer is updated and the run stops, or the step is "
                             "left out (at most 3 of 100)")


class TrainConfig(Section):
    """How long."""

    epochs: Integer = Field(10, ge=1, le=100000, description="passes over the training images")
    batch_size: Integer = Field(128, ge=1, le=1 << 20, description="clean images per step, the same for all peers; "
                                                                   "replicas of a peer share them")
    accumulate: Integer = Field(1, ge=1, le=1024, description="split each batch into this many parts, one after "
                                                              "another, whose gradients are added: less memory")
    replays: Integer = Field(1, ge=1, le=1000, description="steps on each batch, one after another, for attack.method: "
                                                           "free (Free-AT on CIFAR-10: 8); an epoch has so many times "
                                                           "its steps")
    max_steps: Integer | None = Field(None, ge=1, description="stop the training after this many steps")


class EvalConfig(Section):
    """What the evaluator measures during and after the training."""

    every: Integer = Field(1, ge=0, description="epochs between evaluations on the validation split; 0: never")
    attack: Literal["pgd", "cr"] = Field("pgd", description="PGD, or constraint relaxation (linf), which comes near "
                                                            "AutoAttack in some 60 forwards")
    steps: Integer = Field(10, ge=1, le=10000, description="PGD steps on the validation split")
    test_steps: Integer = Field(20, ge=0, le=10000, description="PGD steps on the test set, at the end; 0: no test")
    size: Integer | None = Field(None, ge=1, description="evaluate on this many validation images; default all")
    test_size: Integer | None = Field(None, ge=1, description="evaluate on this many test images; default all")
    chunk: Integer = Field(256, ge=1, le=1 << 20, description="images per unit of work; part of the result's seed")
    ensemble: Literal["prob", "logit"] = Field("prob", description="log of the mean probability, or mean logit")


class CheckpointConfig(Section):
    """When the state is saved."""

    every: Integer = Field(1, ge=1, description="epochs between checkpoints; evaluations have one each, too")
    every_steps: Integer | None = Field(None, ge=1, description="also save after every so many steps")
    keep: Integer = Field(3, ge=2, le=1000, description="newest checkpoints that are kept, besides the best")


def parse_trackers(text: str | None) -> dict[str, str]:
    """The trackers of "tensorboard,wandb:PROJECT" with projects. Raises ValueError for others, or one twice."""
    parts = [] if text is None else [re.fullmatch(r"(tensorboard)|(wandb|mlflow|trackio):(.{1,128})", part.strip())
                                     for part in text.split(",")]
    found = {part[1] or part[2]: part[3] or "" for part in parts if part}
    if len(found) < len(parts):
        raise ValueError("not trackers")
    return found


class LogConfig(Section):
    """What is written and shown while training."""

    every: Integer = Field(50, ge=1, description="steps between log records; only these steps read metrics back")
    console: Literal["auto", "live", "plain", "off"] = Field(
        "auto", description="live table where there is a terminal, plain lines elsewhere")
    trackers: Annotated[str, Written(parse_trackers, "tensorboard,wandb:PROJECT")] | None = Field(
        None, description="where numbers and pictures of AEs are sent too: tensorboard, wandb:PROJECT (Weights & "
                          "Biases), mlflow:EXPERIMENT, trackio:PROJECT, with commas between")


class Config(Section):
    """A whole run. Sections that a peer has too are the defaults of every peer."""

    run: RunConfig = Field(default_factory=RunConfig, description="run folder, seed, device")
    comm: CommConfig = Field(default_factory=CommConfig, description="communication between ranks")
    data: DataConfig = Field(default_factory=DataConfig, description="data set")
    model: ModelConfig = Field(default_factory=ModelConfig, description="default architecture of the peers")
    threat: ThreatConfig = Field(default_factory=ThreatConfig, description="default threat of the peers")
    union: UnionConfig = Field(default_factory=UnionConfig, description="default union of the peers")
    attack: AttackConfig = Field(default_factory=AttackConfig, description="default training attack of the peers")
    loss: LossConfig = Field(default_factory=LossConfig, description="default mutual loss of the peers")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="default optimizer of the peers")
    methods: Methods = Field(default_factory=dict, description="default methods of the peers, a section each")
    peers: tuple[PeerConfig, ...] = Field(
        (PeerConfig(), PeerConfig(), PeerConfig(), PeerConfig()), min_length=1, max_length=MAX_PEERS,
        description="the cohort: a number of equal peers, or a list with an entry per peer")
    step: StepConfig = Field(default_factory=StepConfig, description="precision and memory of a step")
    train: TrainConfig = Field(default_factory=TrainConfig, description="length and batch size")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="evaluator")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="checkpoints")
    log: LogConfig = Field(default_factory=LogConfig, description="records and console")
