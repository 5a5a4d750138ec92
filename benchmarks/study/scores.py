"""What finished runs scored: evaluations by `python -m mat_dist.evaluate`, and accuracies image by image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from benchmarks.study.plan import Evaluation, Kind, Label
from benchmarks.study.runs import Job, Runner, failure
from mat_dist import checkpoints
from mat_dist.config import load_config
from mat_dist.errors import NotReportable
from mat_dist.evaluation.command import asked
from mat_dist.evaluation.results import CLEAN, UNION, Result, read_results
from mat_dist.evaluation.settings import parse
from mat_dist.evaluation.targets import make_job, target_names

Accuracies = Mapping[str, Mapping[int, float]]  # column -> image -> share of the targets that are right


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of a run: which one, of which checkpoint, and its result."""

    name: str
    evaluation: Evaluation
    label: Label
    result: Result

    @property
    def unsound(self) -> list[str]:
        """Checks that failed, by target; empty where there were none."""
        return [f"{one.target}: {check.check}" for one in self.result.targets for check in one.checks or ()
                if not check.passed]

    @cached_property
    def kinds(self) -> Mapping[Kind, Accuracies]:
        """Mean peer, best peer by validation and ensemble -> accuracies image by image."""
        flags = {target: one.correct for (target, _), one in self.result.images.items()}
        peers = [name for name in self.result.document["names"] if not name.startswith("ensemble")]
        chosen = self.result.document["chosen_on_validation"]
        members: dict[Kind, list[str]] = {"mean": peers, "best": [chosen] if chosen else [],
                                          "ensemble": [name for name in flags if name not in peers]}
        return {kind: self._columns([flags[name] for name in names]) for kind, names in members.items() if names}

    def _columns(self, targets: Sequence[Mapping[str, Mapping[int, bool]]]) -> Accuracies:
        threats = [name for name in targets[0] if name not in (CLEAN, UNION)]
        names = self.evaluation.columns(self.name)
        source = dict(zip(names, [UNION] if len(names) == 1 else [*threats, UNION], strict=True))
        return {column: {image: sum(one[name][image] for one in targets) / len(targets) for image in targets[0][name]}
                for column, name in ((CLEAN, CLEAN), *source.items())}


def labels(job: Job, evaluation: Evaluation) -> dict[Label, Label]:
    """Label of the table -> the one that is evaluated: `last` also stands for a best checkpoint that is the last."""
    best, newest = checkpoints.read_best(job.folder), checkpoints.load_manifest(job.folder)
    same = best is None or best.step == newest.step
    return {label: "last" if same else label for label in evaluation.checkpoints}


def evaluate(job: Job, name: str, evaluation: Evaluation, label: Label, runner: Runner) -> Evaluated:
    """The evaluation of a trained run, made where it is not there yet.

    Raises:
        Enough: see `Runner`.
        MatError: it failed; of the class of its exit code. Failed soundness checks are no error here.
    """
    found = find(job, name, evaluation, label)
    if found is None:
        runner.begin(f"{job.row}, seed {job.seed}: {name} of {label}")
        code = runner.run("mat_dist.evaluate", (str(job.folder.path), *words(job, evaluation, label)), job.log)
        if code not in (0, NotReportable.code):
            raise failure(code, job, f"evaluation {name} of {label}")
        found = find(job, name, evaluation, label)
    if found is None:
        raise NotReportable(f"evaluation {name} of {label} left no result", job.folder.name, f"see {job.log.name}")
    return found


def words(job: Job, evaluation: Evaluation, label: Label) -> tuple[str, ...]:
    """The words of the command after the run."""
    targets = "peers" if len(job.config.peers) == 1 else "peers,ensemble"
    return (*evaluation.settings, f"checkpoint={label}", f"targets={targets}", *job.places)


def find(job: Job, name: str, evaluation: Evaluation, label: Label) -> Evaluated | None:
    """The newest result that answers this evaluation."""
    arguments = parse((str(job.folder.path), *words(job, evaluation, label)))
    request = arguments.request
    config = load_config(str(job.folder.config), arguments.settings)
    wanted = {"checkpoint": label, "step": _step(job, label),
              **asked(request, config, make_job(request, config), target_names(request, config)),
              **({} if request.images is None else {"n": request.images})}
    fitting = [one for one in read_results(job.folder.eval, f"evaluate_{request.split}_{label}_*")
               if all(one.document.get(key) == value for key, value in wanted.items())]
    return Evaluated(name, evaluation, label, fitting[-1]) if fitting else None


def _step(job: Job, label: Label) -> int:
    best = checkpoints.read_best(job.folder)
    return best.step if label == "best" and best is not None else checkpoints.load_manifest(job.folder).step


def gathered(found: Mapping[tuple[str, Label], Evaluated]) -> Iterator[tuple[Label, Kind, str, Mapping[int, float]]]:
    """Every column of a run's evaluations; without an attack counts what was measured on most images.

    Args:
        found: (name of the evaluation, label of the table) -> result.
    """
    clean: dict[tuple[Label, Kind], Mapping[int, float]] = {}
    for (_, label), one in found.items():
        for kind, columns in one.kinds.items():
            for column, values in columns.items():
                if column != CLEAN:
                    yield label, kind, column, values
                elif len(values) > len(clean.get((label, kind), ())):
                    clean[label, kind] = values
    for (label, kind), values in clean.items():
        yield label, kind, CLEAN, values
