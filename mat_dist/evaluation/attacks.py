"""The evaluator: clean and PGD accuracy of every peer and of the ensemble, from a complete checkpoint.

fp32 (fp64 runs in fp64), TF32 off, eval mode. The unit of work is a fixed chunk of `eval.chunk` images whose
attack noise is keyed by (seed, norm, restart, chunk); ranks take chunks in turn, so the result depends neither
on the number of ranks nor on their speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.apgd import APGD_L1_SHARE, apgd
from mat_dist.attacks.norms import Threat
from mat_dist.attacks.pgd import pgd
from mat_dist.checkpoints import Manifest, load_peer
from mat_dist.config.fields import parse_threats
from mat_dist.config.schema import Config, PeerConfig
from mat_dist.data import ImageSet, as_float
from mat_dist.distributed.agreement import Agreement
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import StopRequested
from mat_dist.models import Ensemble
from mat_dist.models.classifier import DTYPES, Images, make_model
from mat_dist.models.modes import frozen

ENSEMBLE = "ensemble"
RAW, EMA = "raw", "ema"


@dataclass(frozen=True)
class AttackPlan:
    """PGD of an evaluation: steps, restarts (the worst counts per image), step length (default `reach` eps / steps).

    In l1 it is APGD, whose first step is `step_size` long (default eps), but for an attack with momentum: plain sparse
    PGD breaks fewer images than random search does. `loss` is one of `ATTACK_LOSSES`; `start` is one of `Threat.start`;
    `momentum` is that of `pgd`; `targets` is the number of classes that a targeted loss is led to, one after another.
    """

    steps: int
    restarts: int = 1
    step_size: float | None = None
    loss: str = "ce"
    start: str = "uniform"
    momentum: float | None = None
    reach: float = 2.5
    targets: int = 0

    def size(self, threat: Threat) -> float:
        """Length of the (first) step."""
        if self.step_size is not None:
            return self.step_size
        return threat.eps if self.adaptive(threat) else self.reach * threat.eps / self.steps

    def adaptive(self, threat: Threat) -> bool:
        """Whether it is APGD."""
        return threat.norm == "l1" and self.momentum is None


@dataclass(frozen=True)
class Result:
    """What one target did on every image.

    Attributes:
        target: peer name or "ensemble".
        weights: "raw" or "ema".
        clean_N: labelled correctly (bool).
        robust_TN: still correct under every restart, for each threat (bool); False where clean is.
        samples_N: position of each image in the split.
        labels_N: true classes.
    """

    target: str
    weights: str
    clean_N: Tensor
    robust_TN: Tensor
    samples_N: Tensor
    labels_N: Tensor

    @property
    def clean(self) -> float:
        """Clean accuracy in [0, 1]."""
        return self.clean_N.double().mean().item()

    @property
    def robust(self) -> float:
        """Share of images that withstand all threats (per-sample AND), in [0, 1]."""
        return self.robust_TN.all(0).double().mean().item()

    def against(self, threat: int) -> float:
        """Share of images that withstand one threat."""
        return self.robust_TN[threat].double().mean().item()


def threats_of(peers: Sequence[PeerConfig]) -> list[Threat]:
    """The distinct threats of a cohort, in peer order; every target is attacked with each."""
    union = [parse_threats(p.union.threats) if p.union.threats else [] for p in peers]
    return list(dict.fromkeys(Threat(*pair) for p, more in zip(peers, union, strict=True)
                              for pair in ((p.threat.norm, p.threat.eps), *more)))


def ensemble_of(config: Config, models: Sequence[nn.Module], rule: str | None = None) -> Ensemble:
    """The ensemble of the peers that train, in eval mode, by `rule` or the run's own."""
    voters = [model for model, spec in zip(models, config.peers, strict=True) if not spec.frozen]
    return Ensemble(voters, rule or config.eval.ensemble).eval()


def load_models(config: Config, manifest: Manifest, images: Images, weights: str,
                device: torch.device) -> list[nn.Module]:
    """All peers of a checkpoint, frozen for evaluation, with raw or averaged weights."""
    models = []
    for index, spec in enumerate(config.peers):
        model = make_model(spec, images, seed=config.run.seed, step=config.step, device=device)
        state = load_peer(manifest, index)
        # A peer that keeps no averaged weights takes part in the averaged ensemble with its raw ones.
        model.load_state_dict(state["model"] if weights == RAW or state["ema"] is None else state["ema"])
        models.append(model.eval().requires_grad_(False))
    return models


def evaluate(config: Config, mesh: Mesh, manifest: Manifest, images: Images, data: ImageSet, attack: AttackPlan, *,
             size: int | None = None, purpose: str = "eval", stop: StopFlag | None = None) -> list[Result]:
    """Attack every peer and the ensemble of a checkpoint; the same list on every rank.

    Args:
        data: the split to evaluate on.
        size: use a random subset of so many images, keyed by the run's seed alone; default all.
        purpose: names the split in messages and keys nothing.
        stop: looked at between chunks.

    Raises the error of any rank, on all ranks; StopRequested when any rank was asked to stop before it was done.
    """
    stop = stop or StopFlag()
    agree = Agreement(mesh, f"evaluation of {manifest.directory.name} on {purpose}")
    threats = threats_of(config.peers)
    samples = chosen_images(len(data), size, config.run.seed)
    count = len(samples)
    results: list[Result] = []
    for weights in [RAW, EMA] if any(p.optim.averages for p in config.peers) else [RAW]:
        models = agree.run("loading", load_models, config, manifest, images, weights, mesh.device)
        agree.settle(f"models {weights}")
        names = [*(str(p.name) for p in config.peers), ENSEMBLE]
        targets = [*models, ensemble_of(config, models)]
        # Columns: clean, then each threat; ranks fill their chunks, the rest stays 0 for the sum.
        table_RCN = torch.zeros(len(targets), 1 + len(threats), count, dtype=torch.uint8)
        for chunk in range(mesh.placement.rank, -(-count // config.eval.chunk), mesh.placement.world):
            if stop.requested:
                break
            columns = slice(chunk * config.eval.chunk, min((chunk + 1) * config.eval.chunk, count))
            found = agree.run(f"chunk {chunk}", _attack_chunk, config, targets, threats, data, samples[columns],
                              attack, chunk, mesh.device)
            if found is not None:
                table_RCN[:, :, columns] = found
        agree.settle(f"chunks {weights}")
        if any(row[0] for row in mesh.gather_world([int(stop.requested)])):
            raise StopRequested(f"stopped by a signal during the {agree.where}", str(manifest.directory),
                                "start the same command again to continue with this evaluation")
        table_RCN = mesh.sum_world(table_RCN)
        labels_N = data.labels[samples.to(data.device)].cpu()
        results += [Result(name, weights, row[0].bool(), row[1:].bool(), samples, labels_N)
                    for name, row in zip(names, table_RCN, strict=True)]
    return results


def chosen_images(count: int, size: int | None, seed: int) -> Tensor:
    """Positions of the images to evaluate on, ascending: all, or a keyed random subset of `size`."""
    if size is None or size >= count:
        return torch.arange(count)
    return rng.permutation(rng.key(seed, "eval-subset"), count)[:size].sort().values


def pixels(data: ImageSet, rows: Tensor, device: torch.device, config: Config) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and labels on the device, in the evaluation's precision."""
    images, y_B = data.batch(rows)
    return as_float(images.to(device), DTYPES[config.step.precision]), y_B.to(device)


def _attack_chunk(config: Config, targets: Sequence[nn.Module], threats: Sequence[Threat], data: ImageSet,
                  samples: Tensor, attack: AttackPlan, chunk: int, device: torch.device) -> Tensor:
    """Clean and robust correctness of every target on one chunk -> uint8 (targets, 1 + threats, B)."""
    x_BCHW, y_B = pixels(data, samples, device, config)
    rows = []
    with strict_arithmetic():
        for target in targets:
            clean_B = correct(target, x_BCHW, y_B)
            robust = [clean_B & withstands(target, x_BCHW, y_B, threat, attack, seed=config.run.seed, chunk=chunk)
                      for threat in threats]
            rows.append(torch.stack([clean_B, *robust]))
    return torch.stack(rows).to(device="cpu", dtype=torch.uint8)


def correct(model: nn.Module, x_BCHW: Tensor, y_B: Tensor) -> Tensor:
    """Whether the largest logit is the true class -> bool (B,); logits that are not finite are no answer."""
    with torch.no_grad():
        logits_BK = model(x_BCHW)
    # argmax takes NaN for the largest value: all of class 0 would count as robust.
    return (logits_BK.argmax(-1) == y_B) & logits_BK.isfinite().all(-1)


def withstands(model: nn.Module, x_BCHW: Tensor, y_B: Tensor, threat: Threat, attack: AttackPlan, *, seed: int,
               chunk: int) -> Tensor:
    """Whether each image is still correct after every restart of PGD -> bool (B,)."""
    held_B = torch.ones_like(y_B, dtype=torch.bool)
    for adv in restarts(model, x_BCHW, y_B, threat, attack, seed=seed, chunk=chunk):
        held_B &= correct(model, adv, y_B)
    return held_B


def restarts(model: nn.Module, x_BCHW: Tensor, y_B: Tensor, threat: Threat, attack: AttackPlan, *, seed: int,
             chunk: int, first: int = 0, first_row: int = 0) -> Iterator[Tensor]:
    """The AEs of restarts `first`, `first` + 1, ...; noise keyed by (seed, norm, restart, chunk).

    Args:
        first_row: row of the chunk at which x_BCHW starts, where it is a part of one.
    """
    region = threat.region(x_BCHW, APGD_L1_SHARE)
    for restart in range(first, first + attack.restarts):
        stream = rng.key(seed, f"eval-{threat.norm}", restart, chunk)
        start = threat.start(attack.start, region, x_BCHW, stream=stream, first_row=first_row)
        with frozen(model):
            if attack.adaptive(threat):
                found = apgd(model, x_BCHW, y_B, region=region, start_BCHW=start, loss=attack.loss, steps=attack.steps,
                             step_size=attack.size(threat))
                yield found.best_BCHW if attack.targets else found.wrong_BCHW  # y_B are targets, not labels
            else:
                yield pgd(model, x_BCHW, y_B, region=region, start_BCHW=start, loss=attack.loss, steps=attack.steps,
                          step_size=attack.size(threat), momentum=attack.momentum)


@contextmanager
def strict_arithmetic() -> Iterator[None]:
    """Plain fp32 on GPUs: no TF32, deterministic convolutions; settings are restored."""
    backend, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = backend.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    backend.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = False, False, True, False
    try:
        yield
    finally:
        backend.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


def candidates(specs: Sequence[PeerConfig]) -> list[str]:
    """The peers that may be the best one: the generalists, or where there are none all that train on AEs, or at all."""
    training = [spec for spec in specs if not spec.frozen]
    generalists = [spec for spec in training if spec.role == "generalist"]
    return [str(spec.name) for spec in generalists or [s for s in training if s.loss.learns_aes] or training]


def selection_score(results: Sequence[Result], specs: Sequence[PeerConfig]) -> float:
    """What `best` maximises on the validation split: mean robust accuracy of the `candidates`, with averaged weights
    where they are kept."""
    names = candidates(specs)
    peers = [r for r in results if r.target in names]
    chosen = [r for r in peers if r.weights == EMA] or peers
    return sum(r.robust for r in chosen) / len(chosen)
