"""The evaluator: chunks of images, each attacked and checked by itself; ranks share those that are missing.

fp32 (fp64 runs in fp64), TF32 off, eval mode. What is found on a chunk depends on what is asked for, the models, the
images and the chunk's number alone: neither on the number of ranks nor on their speed. A chunk is saved as one file
where that is wanted, so that a killed or repeated evaluation takes up the files that are there. No rank waits in a
collective while another one attacks.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mat_dist import rng
from mat_dist.config.schema import Config
from mat_dist.data import ImageSet, as_float
from mat_dist.distributed.agreement import Agreement
from mat_dist.distributed.arithmetic import strict_arithmetic
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import EnvironmentFault, OutputError, StopRequested
from mat_dist.evaluation import attacks
from mat_dist.evaluation.attacks import Job, Target, Tell, Tried, rounded, silent
from mat_dist.evaluation.progress import Display, Interrupted, Progress
from mat_dist.evaluation.soundness import examine
from mat_dist.models.registry import DTYPES
from mat_dist.runs.files import parse_json, reported, write_bytes, write_json

FORMAT = 3  # of a chunk's file; 2: l1 was attacked in one ball


@dataclass(frozen=True)
class Work:
    """An evaluation, cut into chunks.

    Attributes:
        config: of the run.
        job: attacks.
        targets: whom.
        data: the split.
        samples_N: positions of the images in it, ascending.
        what: the evaluation in words.
        folder: of the chunks' files; None: they are not saved.
        digest: identifies all that the result depends on; stands in every file.
        checked: chunks, from the first, that the soundness checks look at.
        save: write the AEs too.
        sources: other checkpoints whose AEs join the candidates.
    """

    config: Config
    job: Job
    targets: Sequence[Target]
    data: ImageSet
    samples_N: Tensor
    what: str = "evaluation"
    folder: Path | None = None
    digest: str = ""
    checked: int = 0
    save: bool = False
    sources: Sequence[Target] = ()

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
