"""One evaluation of a run from its folder to the table: what `python -m mat_dist.evaluate RUN` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from traceback import format_exception
from typing import Any

import torch

from mat_dist import checkpoints
from mat_dist.attacks.norms import eps_text
from mat_dist.checkpoints.load import best_peer
from mat_dist.cli import LOGGED, tell
from mat_dist.config.schema import Config
from mat_dist.data import DataSets, ImageSet, load_data, place
from mat_dist.distributed.agreement import Agreement
from mat_dist.distributed.device import device_name, ranks_per_device
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import ConfigError, DataError, NotReportable
from mat_dist.evaluation import autoattack, outcome
from mat_dist.evaluation.attacks import EMA, RAW, candidates, chosen_images, load_models, threats_of
from mat_dist.evaluation.chunks import Work, run_chunks
from mat_dist.evaluation.craft import Job
from mat_dist.evaluation.menu import AUTOATTACK, made_by
from mat_dist.evaluation.request import Request
from mat_dist.evaluation.sources import load_sources
from mat_dist.evaluation.targets import attack_plans, make_targets, target_names, threats_asked
from mat_dist.models.classifier import Images
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.logs import close_logger, rank_logger
from mat_dist.runs.record import versions

NOT_DIGESTED = ("run", "chosen_on_validation", "system")  # none of them changes a result


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a checkpoint of a run, with its images, known before anything is attacked."""

    folder: RunFolder
    config: Config
    manifest: checkpoints.Manifest
    label: str  # best, last or step_N
    weights: str
    images: Images

    @classmethod
    def find(cls, folder: RunFolder, config: Config, request: Request) -> Subject:
        """Raises CheckpointError where there is none, ConfigError for averaged weights that are not kept."""
        label = request.checkpoint
        if label == "best" and checkpoints.read_best(folder) is None:
            label = "last"  # as mat_dist.load does; the table says which it is
        manifest = checkpoints.load_manifest(folder, "latest" if label == "last" else label)
        averaged = any(p.optim.averages for p in config.peers)
        if request.weights == EMA and not averaged:
            raise ConfigError("the run keeps no averaged weights", "weights=ema", "use weights=raw")
        weights = (EMA if averaged else RAW) if request.weights == "auto" else request.weights
        told = manifest.meta.extra["images"]
        images = Images(tuple(told["shape"]), told["classes"], tuple(told["mean"]), tuple(told["std"]))
        return cls(folder, config, manifest, label, weights, images)


def evaluate_run(folder: RunFolder, config: Config, request: Request, mesh: Mesh, launch: Launch,
                 stop: StopFlag) -> None:
    """Attack, check, write and show. Every rank calls it; rank 0 writes the results and prints.

    Raises, on all ranks with one text: ConfigError, DataError, CheckpointError, EnvironmentFault for what does not
    fit; StopRequested; NotReportable when a soundness check failed, after the files are written.
    """
    with _logged(folder, mesh):
        agree = Agreement(mesh, f"evaluation of {folder.name}")
        work, about = agree.run("loading", prepare, folder, config, request, mesh, launch, stop) or (None, None)
        agree.settle("loading")
        assert work is not None and about is not None
        # Nodes may differ in what `about` tells of them: rank 0's counts.
        name, digest = mesh.from_lead([work.folder.name, work.digest])
        work = replace(work, folder=folder.eval / name, digest=digest)
        chunks = run_chunks(work, mesh, stop, tell)
        failed = agree.run("results", _finish, work, about, chunks) if mesh.placement.is_lead else None
        agree.settle("results")
        failed = mesh.from_lead(failed)
    if failed:
        raise NotReportable(f"failed checks: {'; '.join(failed[:6])}", str(work.folder.with_suffix(".json")),
                            "do not report these numbers; docs/evaluation.md says what each check means")


def prepare(folder: RunFolder, config: Config, request: Request, mesh: Mesh, launch: Launch,
            stop: StopFlag) -> tuple[Work, dict[str, Any]]:
    """Settle what is asked for, load models and images -> the work, and what the result file says about it."""
    subject = Subject.find(folder, config, request)
    names = target_names(request, config)
    job = make_job(request, config)
    if made_by(job.attacks, "package"):
        autoattack.require()
        autoattack.check_classes((*job.attacks, *job.custom), subject.images.classes)
        if config.step.precision == "fp64":
            raise ConfigError("pyautoattack computes in fp32, the run in fp64", "attacks",
                              "choose other attacks, such as attacks=pgd,cw,targeted")
    data = load_data(config.data, seed=config.run.seed, batch_size=config.train.batch_size,
                     build_cache=launch.local_rank == 0, stop=stop)
    check_images(data, subject)
    data = place(data, config.data.residency, mesh.device, sharing=ranks_per_device(mesh.device, launch.local_world))
    split: ImageSet = getattr(data, request.split)
    if request.images is not None and request.images > len(split):
        raise DataError(f"{request.images} images are asked for, the {request.split} split has {len(split)}", "images",
                        f"ask for at most {len(split)}")
    samples_N = chosen_images(len(split), request.images, config.run.seed)
    models = load_models(config, subject.manifest, subject.images, subject.weights, mesh.device)
    targets = make_targets(names, [str(p.name) for p in config.peers], models,
                           [str(p.name) for p in config.peers if p.frozen])
    about = describe(subject, request, job, names, data.digest, len(samples_N), mesh.device)
    sources, told = load_sources(request.sources, subject.images, config, mesh.device)
    about |= {"sources": told} if told else {}
    digest = checkpoints.json_digest({key: value for key, value in about.items() if key not in NOT_DIGESTED})
    name = f"evaluate_{request.split}_{subject.label}_{checkpoints.step_name(subject.manifest.step)}_{digest[:12]}"
    checked = -(-request.checks // config.eval.chunk)
    work = Work(config, job, targets, split, samples_N, checked, folder.eval / f"{name}.chunks", digest,
                request.save, sources)
    return work, about | {"digest": digest, "config": config.model_dump(mode="json", exclude={"run": {"name"}})}


def make_job(request: Request, config: Config) -> Job:
    """The attacks that are asked for, on the threats that are asked for."""
    seed = config.run.seed if request.seed is None else request.seed
    threats = threats_asked(request, threats_of(config.peers), config.data.name)
    return Job(tuple(threats), attack_plans(request, config), tuple(request.attacks), request.version,
               tuple(request.custom), request.transfer, seed, request.queries)


def check_images(data: DataSets, subject: Subject) -> None:
    """Raises DataError unless the images are those that the run was trained with."""
    where, images = f"data.name={subject.config.data.name}", subject.images
    if (data.train.shape, len(data.classes)) != (images.shape, images.classes):
        raise DataError(f"images {data.train.shape} of {len(data.classes)} classes, the models take {images.shape} of "
                        f"{images.classes}", where, "give the data set that the run was trained with")
    if data.digest != subject.manifest.meta.data_digest:
        raise DataError("the images are not those that the run was trained with (another SHA-256)", where,
                        "give the data set that the run was trained with")


def describe(subject: Subject, request: Request, job: Job, names: list[str], data_digest: str, count: int,
             device: torch.device) -> dict[str, Any]:
    """All that the result depends on, as JSON values."""
    found = versions()
    system = found.pop("system")
    if made_by(job.attacks, "package"):
        found["pyautoattack"] = metadata.version("pyautoattack")
    return {
        "run": subject.folder.path.resolve().name, "checkpoint": subject.label, "step": subject.manifest.step,
        "files": {entry.name: entry.sha256 for entry in subject.manifest.files},
        "n": count, "data_digest": data_digest, "weights": subject.weights,
        "chosen_on_validation": best_peer(candidates(subject.config.peers), subject.folder,
                                          subject.manifest.step, subject.weights),
        **asked(request, subject.config, job, names), "subset_seed": subject.config.run.seed,
        "precision": subject.config.step.precision, "threads": subject.config.run.threads,
        "device": device_name(device), "versions": found, "system": system,
    }


def asked(request: Request, config: Config, job: Job, names: Sequence[str]) -> dict[str, Any]:
    """The part of `describe` that is known before anything is loaded: a result with the same values answers it."""
    plans = {name: asdict(plan) | {"step_size": {t.label: plan.size(t) for t in job.threats}}
             for name, plan in job.plans.items()}
    return {
        "split": request.split, "names": list(names),
        "threats": [{"norm": t.norm, "eps": eps_text(t.eps), "eps_float": t.eps} for t in job.threats],
        "attacks": list(job.attacks), "plans": plans, "transfer": job.transfer, "saved": request.save,
        "checked_images": request.checks,
        "autoattack": {"version": job.version, "custom": list(job.custom)} if AUTOATTACK in job.attacks else None,
        "queries": job.queries, "seed": job.seed, "chunk": config.eval.chunk,
    }


def _finish(work: Work, about: dict[str, Any], chunks: list[dict[str, Any]]) -> list[str]:
    """Write the files, print the table -> the failed checks in words."""
    outcomes = outcome.gather(chunks)
    name = work.folder.name.removesuffix(".chunks")
    about = about | {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    path = outcome.write_files(work.folder.parent, name, about, outcomes, chunks, about["weights"])
    title = (f"{about['run']}, {about['checkpoint']} (step {about['step']}), {about['split']} split: accuracy without "
             f"attack and under {', '.join(about['attacks'])} [95 % interval]")
    outcome.show(outcome.attacks_table(outcomes))
    if about.get("sources"):
        outcome.show(outcome.sources_table(outcomes))
    outcome.show(outcome.as_table(title.replace("[", r"\["), outcomes, about["weights"]))
    if len(candidates(work.config.peers)) > 1:
        chosen = about["chosen_on_validation"] or "none chosen"
        tell(f"peer to deploy, chosen on the validation split: {chosen}")
    tell(str(path))
    return [f"{one.target}: {v.check}{f' ({v.threat})' if v.threat else ''}, {v.found}"
            for one in outcomes for v in one.failed]


@contextmanager
def _logged(folder: RunFolder, mesh: Mesh) -> Iterator[None]:
    """Tracebacks go to this rank's log."""
    log = rank_logger(folder.path, mesh.placement.rank)
    try:
        yield
    except Exception as error:
        log.error("%s", "".join(format_exception(error)))
        error.add_note(LOGGED)
        raise
    finally:
        close_logger(log)
