"""What `python -m mat_dist.evaluate RUN` does: from a run's folder to its result file and table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib import metadata
from traceback import format_exception
from typing import Any

from rich.table import Table
from torch import Tensor

from mat_dist.checkpoints import json_digest, load_manifest, read_best, step_name
from mat_dist.checkpoints.load import BEST, EMA, FinishedRun, candidates, open_run
from mat_dist.cli import LOGGED, tell
from mat_dist.config.norms import known_norms
from mat_dist.config.schema import Config
from mat_dist.data import DataSets, ImageSet, load_data, place
from mat_dist.distributed.agreement import Agreement
from mat_dist.distributed.groups import Mesh, device_name
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import ConfigError, DataError, NotReportable, OutputError
from mat_dist.evaluation import autoattack
from mat_dist.evaluation.attacks import FROM, Job
from mat_dist.evaluation.chunks import Work, chosen_images, run_chunks
from mat_dist.evaluation.foreign import unconfirmed
from mat_dist.evaluation.results import HEADLINE, TargetResult, Verdict, accuracies, as_result, wilson_interval
from mat_dist.evaluation.settings import AUTOATTACK, Request, made_by
from mat_dist.evaluation.soundness import judge_training
from mat_dist.evaluation.survivors import VOLATILE, Found, about_job, about_run, document_of, image_rows, write_result
from mat_dist.evaluation.targets import load_sources, make_job, make_targets, target_names
from mat_dist.models.registry import of_plugins
from mat_dist.runs.console import choose_screen, new_table, show_table
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.session import close_logger, rank_logger

NOT_DIGESTED = ("format", "run", "config", *VOLATILE)


def evaluate_run(folder: RunFolder, config: Config, request: Request, mesh: Mesh, launch: Launch,
                 stop: StopFlag) -> None:
    """Attack, check, write and show. Every rank calls it; rank 0 writes the results and prints.

    Raises, on all ranks with one text: ConfigError, DataError, CheckpointError, EnvironmentFault for what does not
    fit; StopRequested; NotReportable when a soundness check failed, after the files are written.
    """
    if mesh.placement.is_lead and request.idle:
        tell(f"note: no attack of {', '.join(request.attacks)} reads {', '.join(request.idle)}")
    with _logged(folder, mesh), closing(choose_screen("auto" if mesh.placement.is_lead else "off")) as screen:
        screen.start(0, (), 0)
        screen.status("loading models and images")
        agree = Agreement(mesh, f"evaluation of {folder.name}")
        prepared = agree.run("loading", prepare, folder, config, request, mesh, launch, stop)
        agree.sync("loading")
        work, about, training = prepared
        # The name holds a digest of all that the result depends on. Nodes may differ in what they tell of themselves:
        # rank 0's word counts.
        name, digest = mesh.from_lead([f"evaluate_{about['split']}_{about['checkpoint']}_{step_name(about['step'])}_"
                                       f"{about['digest'][:12]}", about["digest"]])
        chunks = run_chunks(replace(work, folder=folder.eval / f"{name}.chunks", digest=digest), mesh, stop, screen)
        screen.close()
        told = None
        if mesh.placement.is_lead:
            told = agree.run("results", finish, folder, config, name, {about["weights"]: chunks}, about, training)
        agree.sync("results")
        path, failed = mesh.from_lead(told)
    if failed:
        raise NotReportable(f"failed checks: {'; '.join(failed[:6])}", path,
                            "do not report these numbers; docs/evaluation.md says what each check means")


def open_asked(folder: RunFolder, config: Config, request: Request) -> tuple[FinishedRun, str]:
    """The run with the weights and the checkpoint that are asked for, and its label in results: best, last or step_N.

    Raises CheckpointError where there is none, ConfigError for averaged weights that are not kept.
    """
    if request.weights == EMA and not any(spec.averages for spec in config.peers):
        raise ConfigError("the run keeps no averaged weights", "weights=ema", "use weights=raw")
    which, weights = request.checkpoint, None if request.weights == "auto" else request.weights
    last = which == "latest" or (which == BEST and read_best(folder) is None)
    return open_run(folder.path, which, weights, config), "last" if last else which


def prepare(folder: RunFolder, config: Config, request: Request, mesh: Mesh, launch: Launch,
            stop: StopFlag) -> tuple[Work, dict[str, Any], list[Verdict]]:
    """Settle what is asked for, load models and images -> the work, what the result file says of it, and what is to be
    said of the training."""
    run, label = open_asked(folder, config, request)
    names, job = target_names(request, config), make_job(request, config)
    check_package(job, run.images.classes, config)
    data = load_data(config.data, seed=config.run.seed, batch_size=config.train.batch_size,
                     build_cache=launch.local_rank == 0, stop=stop)
    check_images(data, run)
    data = place(data, config.data.residency, mesh.device, sharing=mesh.sharing)
    split: ImageSet = getattr(data, request.split)
    samples_N = asked_images(request, split)
    targets = make_targets(names, run.peers, run.models(mesh.device),
                           [str(spec.name) for spec in config.peers if spec.frozen])
    sources, told = load_sources(request.sources, run.images, config, mesh.device)
    newest = load_manifest(folder) if label == "best" else run.manifest
    about = about_run(run, label, device_name(mesh.device)) | asked(request, config, job, names) | {
        "n": len(samples_N), "data_digest": data.digest, "weights": run.weights,
        "chosen_on_validation": run.chosen_peer(), **({"sources": told} if told else {}),
        **of_plugins(config.peers, *(threat.kind for threat in job.threats))}
    if made_by(job.attacks, "package"):
        about["versions"]["pyautoattack"] = metadata.version("pyautoattack")
    about["digest"] = json_digest({key: value for key, value in about.items() if key not in NOT_DIGESTED})
    work = Work(config, job, targets, split, samples_N, checked=-(-request.checks // config.eval.chunk),
                save=request.save, sources=sources)
    return work, about, [judge_training(config, newest.meta, newest.step),
                         *unconfirmed(run, targets[0].model)]


def check_package(job: Job, classes: int, config: Config) -> None:
    """Where pyautoattack is asked for: raises ConfigError for what it cannot do, EnvironmentFault without it."""
    if not made_by(job.attacks, "package"):
        return
    for threat in job.threats:
        if threat.info.autoattack is None:
            able = [name for name, info in known_norms().items() if info.autoattack]
            raise ConfigError(f"AutoAttack and its parts know {', '.join(able)}, not the norm {threat.norm}", "attacks",
                              "write attacks=pgd,cw,targeted,search, or threats in other norms")
    autoattack.require()
    autoattack.check_classes((*job.attacks, *job.custom), classes)
    if config.step.precision == "fp64":
        raise ConfigError("pyautoattack computes in fp32, the models in fp64", "attacks",
                          "choose other attacks, such as attacks=pgd,cw,targeted")


def asked_images(request: Request, split: ImageSet) -> Tensor:
    """Positions of the images to attack. Raises DataError where there are fewer."""
    if request.images is not None and request.images > len(split):
        raise DataError(f"{request.images} images are asked for, the {request.split} split has {len(split)}", "images",
                        f"ask for at most {len(split)}")
    return chosen_images(len(split), request.images)


def check_images(data: DataSets, run: FinishedRun) -> None:
    """Raises DataError unless the images are those that the run was trained with."""
    where, images = f"data.name={run.config.data.name}", run.images
    if (data.train.shape, len(data.classes)) != (images.shape, images.classes):
        raise DataError(f"images {data.train.shape} of {len(data.classes)} classes, the models take {images.shape} of "
                        f"{images.classes}", where, "give the data set that the run was trained with")
    if data.digest != run.manifest.meta.data_digest:
        raise DataError("the images are not those that the run was trained with (another SHA-256)", where,
                        "give the data set that the run was trained with")


def asked(request: Request, config: Config, job: Job, names: Sequence[str]) -> dict[str, Any]:
    """What a document says that is known before anything is loaded: a result with the same values answers it."""
    return about_job(job, config.eval.chunk) | {
        "split": request.split, "names": list(names), "saved": request.save, "checked_images": request.checks,
        "autoattack": {"version": job.version, "custom": list(job.custom)} if AUTOATTACK in job.attacks else None,
        "queries": job.queries}


def finish(folder: RunFolder, config: Config, name: str, chunks: Found, about: dict[str, Any],
           training: Sequence[Verdict]) -> tuple[str, list[str]]:
    """Write the files, print the tables -> the path of the document, and the failed checks in words."""
    document = document_of(about, chunks, checked=True, training=training)
    path = write_result(folder.eval, name, document, image_rows(chunks))
    result = as_result(document)
    found = result.targets
    title = (f"{about['run']}, {about['checkpoint']} (step {about['step']}), {about['split']} split: accuracy without "
             f"attack and under {', '.join(result.named_attacks())} [95 % interval]")
    show_table(attacks_table(found))
    if about.get("sources"):
        show_table(sources_table(found))
    show_table(as_table(title.replace("[", r"\["), found))
    for reason in dict.fromkeys(f"{v.check}: {v.found}" for one in found for v in one.bad if v.check in HEADLINE):
        tell(f"not reportable, {reason}")
    if len(candidates(config.peers)) > 1:
        tell(f"peer to deploy, chosen on the validation split: {about['chosen_on_validation'] or 'none chosen'}")
    tell(str(path))
    return str(path), [f"{one.target}: {v.check}{f' ({v.threat})' if v.threat else ''}, {v.found}"
                       for one in found for v in one.bad if v.check not in HEADLINE]


@contextmanager
def _logged(folder: RunFolder, mesh: Mesh) -> Iterator[None]:
    """Tracebacks go to this rank's log."""
    try:
        log = rank_logger(folder.path, mesh.placement.rank)
    except OutputError as error:
        raise OutputError(error.what, error.where, "results are written into the folder of the run: make it writable, "
                          "or evaluate a copy of it") from error
    try:
        yield
    except Exception as error:
        log.error("%s", "".join(format_exception(error)))
        error.add_note(LOGGED)
        raise
    finally:
        close_logger(log)


# ------------------------------------------------------------------------------------------------ tables


def as_table(title: str, found: Sequence[TargetResult]) -> Table:
    """A row per target: per cent with half the 95 % interval, worst over attacks; whether it may be reported."""
    shown = accuracies(found[0].attacks)
    table = new_table(title, ("target", "weights"), (*(f"{name} %" for name in shown), "n"))
    table.add_column("reportable", overflow="fold", min_width=len("reportable"))
    for one in found:
        cells = [f"{100 * one.accuracy[name]:.2f} \\[{100 * low:.1f}, {100 * high:.1f}]"
                 for name in shown for low, high in [wilson_interval(one.accuracy[name], one.n)]]
        failed = ", ".join(dict.fromkeys(v.check for v in one.bad))
        table.add_row(one.target, one.weights, *cells, str(one.n),
                      f"NO: {failed}" if failed else "yes" if one.checks else "not checked")
    return table


def attacks_table(found: Sequence[TargetResult]) -> Table:
    """A row per target and threat: per cent that withstand each attack alone."""
    names = list(dict.fromkeys(name for one in found for shares in one.attacks.values() for name in shares
                               if not name.startswith(FROM)))
    table = new_table("Accuracy under each attack alone, %", ("target", "threat"), names)
    for one in found:
        for threat, shares in one.attacks.items():
            table.add_row(one.target, threat, *(f"{100 * shares[name]:.2f}" if name in shares else "-"
                                                for name in names))
    return table


def sources_table(found: Sequence[TargetResult]) -> Table:
    """A row per other checkpoint and threat: per cent of each target that withstand that one's AEs."""
    table = new_table("Accuracy on AEs of other checkpoints, %", ("source", "threat"), (one.target for one in found))
    for threat, shares in found[0].attacks.items():
        for name in shares:
            if name.startswith(FROM):
                table.add_row(name, threat, *(f"{100 * one.attacks[threat][name]:.2f}" for one in found))
    return table
