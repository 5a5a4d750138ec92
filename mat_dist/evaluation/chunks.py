"""The evaluator: chunks of images, each attacked and checked by itself; ranks share those that are missing.

fp32 (fp64 runs in fp64), TF32 off, eval mode. What is found on a chunk depends on what is asked for, the models, the
images and the chunk's number alone: neither on the number of ranks nor on their speed. A chunk is saved as one file
where that is wanted, so that a killed or repeated evaluation takes up the files that are there. No rank waits in a
collective while another one attacks.

How far it is is told to a screen between two passes, where a request to stop is obeyed too. A pass is that of one image
through one network. How many an attack needs is an estimate: which images are broken early is not known beforehand. It
sets the pace of what is shown, and no result depends on it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.config.schema import Config
from mat_dist.data import ImageSet, as_float
from mat_dist.distributed.agreement import Agreement
from mat_dist.distributed.arithmetic import strict_arithmetic
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import EnvironmentFault, OutputError, StopRequested
from mat_dist.evaluation import attacks
from mat_dist.evaluation.attacks import NOISE_DRAWS, Job, Target, Tell, Tried, rounded, silent
from mat_dist.evaluation.results import CLEAN
from mat_dist.evaluation.settings import AUTOATTACK, MENU, made_by
from mat_dist.evaluation.soundness import CHECKING, OWN_STEPS, SEARCH_QUERIES, examine
from mat_dist.models.registry import DTYPES
from mat_dist.runs.console import Screen, duration
from mat_dist.runs.files import parse_json, reported, write_bytes, write_json
from mat_dist.runs.metrics import Reporter

PACKAGE, PACKAGE_ALL = 1000, 4000  # passes of an image under one attack of AutoAttack, and under all of them
REFRESH_S = 0.25
SURE_AFTER_S, LONG_S = 5.0, 120.0  # when the pace is known, and what is worth a warning
Display = Screen | Reporter
FORMAT = 3  # of a chunk's file; 2: l1 was attacked in one ball


@dataclass(frozen=True)
class Work:
    """An evaluation, cut into chunks."""

    config: Config  # of the run
    job: Job
    targets: Sequence[Target]
    data: ImageSet  # the split
    samples_N: Tensor  # positions of the images in it, ascending
    what: str = "evaluation"  # in words
    folder: Path | None = None  # of the chunks' files; None: they are not saved
    digest: str = ""  # identifies all that the result depends on; stands in every file
    checked: int = 0  # chunks, from the first, that the soundness checks look at
    save: bool = False  # write the AEs too
    sources: Sequence[Target] = ()  # other checkpoints whose AEs join the candidates

    @property
    def same(self) -> dict[str, Target]:
        """Whose results each target has: what is found on the one member of an ensemble is found on the ensemble too,
        so that it is attacked once."""
        return {one.name: one.members[0] if len(one.members) == 1 else one for one in self.targets}

    @property
    def count(self) -> int:
        """Number of chunks."""
        return -(-len(self.samples_N) // self.config.eval.chunk)

    def rows(self, chunk: int) -> Tensor:
        """Positions in the split of a chunk's images."""
        size = self.config.eval.chunk
        return self.samples_N[chunk * size:(chunk + 1) * size]

    def file(self, chunk: int) -> Path:
        assert self.folder is not None
        return self.folder / f"chunk_{chunk:05d}.json"

    def read(self, chunk: int) -> dict[str, Any] | None:
        """What is saved of a chunk; None where there is nothing, or nothing that belongs to this evaluation."""
        try:
            found = parse_json(self.file(chunk).read_bytes())
        except (OSError, ValueError):  # absent, or damaged: attacked again and replaced
            return None
        expected = {"format": FORMAT, "digest": self.digest, "chunk": chunk, "samples": self.rows(chunk).tolist()}
        return found if isinstance(found, dict) and expected.items() <= found.items() else None


def chosen_images(count: int, size: int | None) -> Tensor:
    """Positions of the images to evaluate on, ascending: all, or a random subset of `size`, the same one for every seed
    and part of every larger one, so that results of several seeds are about the same images."""
    if size is None or size >= count:
        return torch.arange(count)
    return rng.permutation(rng.key(0, "eval-subset"), count)[:size].sort().values


def pixels(data: ImageSet, rows: Tensor, device: torch.device, config: Config) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and labels on the device, in the evaluation's precision."""
    images, y_B = data.batch(rows)
    return as_float(images.to(device), DTYPES[config.step.precision]), y_B.to(device)


def attack_chunk(work: Work, chunk: int, device: torch.device, tell: Tell = silent) -> dict[str, Any]:
    """All attacks and checks on one chunk, as it is saved."""
    x_BCHW, y_B = pixels(work.data, work.rows(chunk), device, work.config)
    same = work.same
    targets = list({one.name: one for one in same.values()}.values())
    # Models that draw in eval mode: a chunk's result depends neither on the rank nor on the chunks before it.
    with strict_arithmetic(), rng.keyed_rng(rng.key(work.config.run.seed, "eval-draws", chunk)):
        clean, tried = attacks.attack_targets(targets, x_BCHW, y_B, work.job, chunk, tell)
        attacks.replay_sources(work.sources, targets, x_BCHW, y_B, clean, tried, work.job, chunk, tell)
        transfer, counts = attacks.transfer_counts(tried, y_B), {}
        for target in targets if chunk < work.checked else ():
            mine = {label: one for (name, label), one in tried.items() if name == target.name}
            counts[target.name] = examine(target, x_BCHW, y_B, mine, work.job, chunk, tell)
        clean = {name: clean[one.name] for name, one in same.items()}
        counts = {name: counts[one.name] for name, one in same.items() if one.name in counts}
        tried = {(name, threat.label): tried[one.name, threat.label] for name, one in same.items()
                 for threat in work.job.threats}
        fooled = _save_aes(work, chunk, x_BCHW, y_B, tried) if work.save else {}
    warnings = sorted({f"{name}, {label}: {text}" for (name, label), one in tried.items() for text in one.warnings})
    digest = hashlib.sha256(rounded(x_BCHW).cpu().numpy().tobytes() + y_B.cpu().numpy().tobytes()).hexdigest()
    return {"format": FORMAT, "digest": work.digest, "chunk": chunk, "samples": work.rows(chunk).tolist(),
            "labels": y_B.tolist(), "images": digest, "predictions": attacks.table(clean, tried),
            "transfer": transfer, "rounded": fooled, "checks": counts, "warnings": warnings}


def _save_aes(work: Work, chunk: int, x_BCHW: Tensor, y_B: Tensor,
              tried: Mapping[tuple[str, str], Tried]) -> dict[str, dict[str, list[int]]]:
    """Write the chunk's AEs -> predictions on them after rounding to bytes: target -> threat -> classes."""
    models = {target.name: target.model for target in work.targets}
    saved: dict[str, dict[str, dict[str, Tensor]]] = {}
    predictions: dict[str, dict[str, list[int]]] = {}
    for (name, label), one in tried.items():
        adv_BCHW = attacks.strongest(one, y_B)
        bytes_BCHW = rounded(adv_BCHW)
        saved.setdefault(name, {})[label] = {"float32": adv_BCHW.float().cpu(), "uint8": bytes_BCHW.cpu()}
        found = attacks.predict(models[name], as_float(bytes_BCHW, x_BCHW.dtype))
        predictions.setdefault(name, {})[label] = found.tolist()
    buffer = io.BytesIO()
    torch.save({"samples": work.rows(chunk), "labels": y_B.cpu(), "aes": saved}, buffer)
    write_bytes(work.file(chunk).with_suffix(".pt"), buffer.getbuffer())
    return predictions


# ------------------------------------------------------------------------------------------------ how far it is


class Interrupted(Exception):
    """A chunk is left unfinished, since this process was asked to stop."""


def passes(name: str, job: Job) -> int:
    """About so many passes of an image under one attack, or in the checks."""
    if name == CHECKING:
        steps = max((plan.steps for plan in job.plans.values()), default=OWN_STEPS)
        return 2 * NOISE_DRAWS + SEARCH_QUERIES + 7 * steps
    if (plan := job.plans.get(name)) is not None:
        return plan.steps * max(map(plan.starts, job.threats)) * max(plan.targets, 1)
    package = PACKAGE_ALL if name == AUTOATTACK else PACKAGE
    return {"noise": NOISE_DRAWS, "search": job.queries, "relaxation": 110}.get(MENU[name].maker, package)


class Progress:
    """What one rank does of an evaluation.

    Args:
        work: the evaluation.
        chunks: those of this rank.
        stop: set by a signal.
        display: told now and then, between two passes.
    """

    def __init__(self, work: Work, chunks: Sequence[int], stop: StopFlag, display: Display) -> None:
        self._work, self._chunks, self._stop, self._display = work, chunks, stop, display
        attacked = {t.name: t for target in (*work.same.values(), *work.sources) for t in (target, *target.members)}
        self._modules = {id(model): model for t in attacked.values() for model in (t.model, *t.attacked)}
        self._networks = {name: len(t.attacked) * sum(id(part) in self._modules for part in t.model.modules())
                          for name, t in attacked.items()}
        self._total = sum(self._cost(chunk) for chunk in chunks)
        self._began = self._shown = monotonic()
        self._number = self._images = 0  # chunks begun; images of the newest
        self._done = 0  # passes of all chunks and attacks that are over
        self._unit = self._within = 0  # passes of what goes on, estimated and made
        # (target, threat) -> survivors and images: of whole chunks, and after each attack.
        self._held: dict[tuple[str, str], tuple[int, int]] = {}
        self._tally: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
        self._before = CLEAN  # what the images withstood last
        self._text = ""
        self._slow = made_by(work.job.attacks, "package")  # of which a warning is due

    def __deepcopy__(self, memo: dict[int, Any]) -> Progress:
        return self  # a copy of a network, made for attacks, is watched with it

    def _cost(self, chunk: int) -> int:
        work = self._work
        names = [*work.job.attacks, *([CHECKING] if chunk < work.checked else [])]
        each = len(work.job.threats) * sum(passes(name, work.job) for name in names)
        return len(work.rows(chunk)) * each * sum(self._networks.values())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at each pass of every network."""
        hooks = [model.register_forward_pre_hook(self._passed) for model in self._modules.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._display.status("")

    def chunk(self) -> None:
        """The next chunk begins."""
        self._done = sum(map(self._cost, self._chunks[:self._number]))
        self._images, self._unit = len(self._work.rows(self._chunks[self._number])), 0
        self._number += 1

    def attack(self, target: str, threat: str, name: str, held: int, of: int) -> None:
        """An attack on a target begins; so many of the chunk's images are right until now. No name: it was the last;
        no images: it is none of the attacks that count."""
        self._done += self._unit
        survivors, images = _sum(self._held.get((target, threat), (0, 0)), (held, of))
        if of:
            row = self._tally.setdefault((target, threat), {})
            row[self._before] = _sum(row.get(self._before, (0, 0)), (held, of))
            self._before = name or CLEAN
        self._within = 0
        self._unit = passes(name, self._work.job) * self._images * self._networks[target] if name else 0
        if not name:
            self._held[target, threat] = survivors, images
            return
        self._text = (f"{self._work.what}: {target}, {threat}, {name}: {survivors} of {images} hold, chunk "
                      f"{self._number} of {len(self._chunks)}")
        self._tell()

    def _passed(self, model: nn.Module, given: Any) -> None:
        if self._stop.requested:
            raise Interrupted
        self._within += len(given[0])
        if monotonic() - self._shown >= REFRESH_S:
            self._tell()

    def _tell(self) -> None:
        self._shown = now = monotonic()
        share = (self._done + min(self._within, self._unit)) / self._total
        elapsed = now - self._began
        left = elapsed * (1 - share) / share if share > 0 else None
        self._display.status(self._text, elapsed, left, self._tally)
        if self._slow and left is not None and elapsed >= SURE_AFTER_S:
            if left >= LONG_S:
                rest = sum(passes(name, self._work.job) for name in self._work.job.attacks if name not in self._slow)
                whole = rest + sum(passes(name, self._work.job) for name in self._slow)
                self._display.note(f"about {duration(left)} more; without {', '.join(self._slow)} about "
                                   f"{duration(left * rest / whole)}: attacks=pgd,cw, or images=N for a part")
            self._slow = []


def _sum(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]


# ------------------------------------------------------------------------------------------------ all chunks


def run_chunks(work: Work, mesh: Mesh, stop: StopFlag, display: Display) -> list[dict[str, Any]]:
    """Attack what is missing, on all ranks -> the content of every chunk, in order (rank 0; empty on the others).

    Args:
        display: told of what this rank does; shows nothing but on rank 0.

    Raises the error of any rank, on all ranks; StopRequested when any rank was asked to stop before it was done.
    """
    agree = Agreement(mesh, work.what)
    lead = mesh.placement.is_lead
    missing = agree.run("looking for finished chunks", _missing, work) if lead else None
    agree.sync("finished chunks")
    missing = mesh.from_lead(missing)
    if len(missing) < work.count:
        display.note(f"{work.count - len(missing)} of {work.count} chunks are there already")
    mine, unsaved = missing[mesh.placement.rank::mesh.placement.world], {}
    progress = Progress(work, mine, stop, display)
    with progress.watching():
        for chunk in mine:
            if stop.requested or agree.failure is not None:
                break
            progress.chunk()
            unsaved[chunk] = agree.run(f"chunk {chunk}", _attack_and_save, work, chunk, mesh.device, progress.attack)
    agree.sync("chunks")
    if any(row[0] for row in mesh.gather_world([int(stop.requested)])):
        again = ": finished chunks are not repeated" if work.folder else " from its beginning"
        raise StopRequested(f"stopped by a signal during the {work.what}", str(work.folder or "eval"),
                            f"start the same command again to go on with the evaluation{again}")
    if work.folder is None:
        pairs = [pair for rank in mesh.gather_json([[chunk, unsaved[chunk]] for chunk in mine]) for pair in rank]
        return [found for _, found in sorted(pairs, key=lambda pair: pair[0])] if lead else []
    found = agree.run("collecting the chunks", _collect, work) if lead else []
    agree.sync("collected chunks")
    return found


def _missing(work: Work) -> list[int]:
    if work.folder is None:
        return list(range(work.count))
    with reported(work.folder):
        work.folder.mkdir(parents=True, exist_ok=True)
    return [chunk for chunk in range(work.count) if work.read(chunk) is None]


def _attack_and_save(work: Work, chunk: int, device: torch.device, tell: Tell) -> dict[str, Any] | None:
    """Attack a chunk; what was found where it is not saved. None also where a request to stop left it unfinished."""
    try:
        found = attack_chunk(work, chunk, device, tell)
    except Interrupted:
        return None
    except torch.OutOfMemoryError as error:  # PGD has tried parts; AutoAttack's result depends on its batch
        raise EnvironmentFault(f"not enough device memory: {error}", f"chunk {chunk}",
                               "use a smaller eval.chunk; chunks of another size have other noise") from error
    if work.folder is None:
        return found
    write_json(work.file(chunk), found)
    return None


def _collect(work: Work) -> list[dict[str, Any]]:
    found = [work.read(chunk) for chunk in range(work.count)]
    absent = [str(chunk) for chunk, content in enumerate(found) if content is None]
    if absent:
        raise OutputError(f"chunks {', '.join(absent[:8])} cannot be read back", str(work.folder),
                          "the run folder must be on a file system that all nodes share; start the command again")
    return [content for content in found if content is not None]
