"""What a training asks of the evaluator: its validation, its tests, and pictures of adversarial examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from rich.table import Table

from mat_dist.attacks.norms import Threat
from mat_dist.checkpoints import Best, Manifest, load_manifest, mark_best, read_best, step_name
from mat_dist.checkpoints.load import EMA, ENSEMBLE, RAW, FinishedRun, candidates, validation_file
from mat_dist.config.schema import Config, PeerConfig
from mat_dist.data import DataSets, ImageSet
from mat_dist.distributed.agreement import Agreement
from mat_dist.distributed.arithmetic import strict_arithmetic
from mat_dist.distributed.groups import Mesh, device_name
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import CheckpointError
from mat_dist.evaluation.attacks import AttackPlan, Job, Target, craft, predict, scaled, shown_rows
from mat_dist.evaluation.chunks import Work, chosen_images, pixels, run_chunks
from mat_dist.evaluation.results import CLEAN, UNION, TargetResult, accuracies, as_result
from mat_dist.evaluation.survivors import Chunks, Found, about_job, about_run, document_of, image_rows, write_result
from mat_dist.evaluation.targets import threats_of
from mat_dist.runs.console import new_table, percent
from mat_dist.runs.metrics import Reporter
from mat_dist.runs.session import Run
from mat_dist.runs.trackers import Picture

LOOKED_AT = 64  # images of which the pictures are chosen


@dataclass
class Evaluations:
    """What the training asks of the evaluator. Every rank calls the methods; rank 0 writes and shows."""

    config: Config
    mesh: Mesh
    run: Run
    data: DataSets
    stop: StopFlag
    reporter: Reporter

    def begin(self, first: int, total: int, evaluates_at: Callable[[int], bool]) -> None:
        """Steps `first` .. total - 1 come next, and evaluations after some of them."""
        one = self.cost(self.data.val, self.config.eval.size, self.config.eval.steps)
        ahead = dict.fromkeys(filter(evaluates_at, range(first + 1, total + 1)), one)
        if self.config.eval.test_steps:
            test = self.cost(self.data.test, self.config.eval.test_size, self.config.eval.test_steps)
            ahead[total] = ahead.get(total, 0.0) + test * (2 if self.config.eval.every else 1)  # best and last
        self.reporter.start(total, [str(spec.name) for spec in self.config.peers], first_step=first, evaluations=ahead)

    def cost(self, data: ImageSet, size: int | None, steps: int) -> float:
        """About how many training steps' time an evaluation takes, by passes through one peer."""
        peers = self.config.peers
        weights = 2 if any(spec.averages for spec in peers) else 1
        passes = min(size or len(data), len(data)) * (steps + 1) * len(threats_of(peers)) * weights * 2 * len(peers)
        return passes / (self.config.train.batch_size * sum(spec.attack.steps + len(peers) for spec in peers))

    def lacks(self, done: int) -> bool:
        """Whether the checkpoint of step `done` has not been evaluated on the validation split."""
        return bool(self.mesh.from_lead(not validation_file(self.run.folder, done).exists()))

    def validate(self, done: int, manifest: Manifest, progress: Mapping[str, Any]) -> list[float | None]:
        """Attack the checkpoint of step `done` on the validation split; mark it where it is the best so far.

        Args:
            progress: what the record of this evaluation begins with: step, epoch, lr.

        Returns:
            Each peer's robust accuracy against its own threat, with raw weights, in [0, 1]; None for a peer that does
            not train.

        Raises the error of any rank, on all ranks; StopRequested when any rank was asked to stop before it was done.
        """
        began, job = perf_counter(), self.job(self.config.eval.steps)
        self._score_again(job)
        found = self.attack(manifest, job, "val", self.config.eval.size)
        agree = Agreement(self.mesh, f"validation after step {done}", done)
        own: list[float | None] = []
        record: dict[str, Any] = {}
        if self.mesh.placement.is_lead:
            document = document_of(self.about(manifest, job, step_name(done), "val"), found, checked=False)
            targets = as_result(document).targets
            record = {**progress, "eval_s": perf_counter() - began, "attack": attack_name(job),
                      **validation_record(targets)}
            agree.run("records", self._record_validation, manifest, document, targets, record)
            self.show_gallery("validation", manifest, self.data.val, job, targets)
            if lost := collapsed(found[RAW], self.config.peers):
                self.note(f"warning: {', '.join(lost)} gave all validation images the same class after step {done}: if "
                          "it stays so, begin anew with a lower optim.lr or with optim.clip_norm=1")
            own = own_robust(targets, self.config.peers)
        self.run.outlives(agree, "records", f"no result of the evaluation after step {done}", self.note)
        self.reporter.tell("evaluation", {"split": "val", **record})
        told: list[float | None] = self.mesh.from_lead(own)
        return told

    def finish(self, best: Manifest | None, newest: Manifest) -> None:
        """Attack the best (if there were evaluations) and the newest checkpoint on the test set, show the table.

        A damaged one does not keep the other from its result; its error comes last.
        """
        job = self.job(self.config.eval.test_steps)
        labels: dict[int, list[str]] = {}  # step -> the names of its checkpoint
        manifests = {"best": best, "last": newest} if best else {"last": newest}
        for label, manifest in manifests.items():
            labels.setdefault(manifest.step, []).append(label)
        shown: dict[str, Sequence[TargetResult]] = {}
        damaged: CheckpointError | None = None
        for names in labels.values():
            manifest = manifests[names[0]]
            name = manifest.directory.name
            try:
                self.note(f"attacking {name} ({names[0]}) on the test set: {attack_name(job)}")
                found = self.attack(manifest, job, "test", self.config.eval.test_size)
            except CheckpointError as error:
                damaged = error
                continue
            if self.mesh.placement.is_lead:
                self.run.check_owner()
                document = document_of(self.about(manifest, job, names[0], "test"), found, checked=False)
                targets = as_result(document).targets
                for label in names:
                    write_result(self.run.folder.eval, f"test_{label}_{name}", {**document, "checkpoint": label},
                                 image_rows(found))
                    self.show_gallery(f"test_{label}", manifest, self.data.test, job, targets)
                shown[", ".join(names)] = targets
                self.reporter.tell("evaluation", {"split": "test", "step": manifest.step, "checkpoint": names,
                                                  **validation_record(targets)})
        if shown:
            self.reporter.table(final_table(attack_name(job), shown))
        if damaged is not None:
            raise damaged

    def job(self, steps: int) -> Job:
        """The attack of the settings with every threat of the cohort; of PGD so many steps."""
        name: str = self.config.eval.attack
        plans = {name: AttackPlan(steps, 1)} if name == "pgd" else {}
        return Job(tuple(threats_of(self.config.peers)), plans, (name,), transfer=False,
                   seed=self.config.run.seed, keep=False)

    def attack(self, manifest: Manifest, job: Job, split: str, size: int | None) -> Found:
        """Every peer and the ensemble of a checkpoint, with raw weights, and with averaged ones where they are kept.

        An ensemble is attacked by itself, not by its members' AEs too, as `python -m mat_dist.evaluate` does; one of a
        single member is that one.
        """
        data: ImageSet = getattr(self.data, split)
        samples_N = chosen_images(len(data), size)
        what = f"evaluation of {manifest.directory.name} on {'validation' if split == 'val' else split}"
        agree = Agreement(self.mesh, what)
        found = {}
        for weights in [RAW, EMA] if any(spec.averages for spec in self.config.peers) else [RAW]:
            run = self.opened(manifest, weights)
            models = agree.run("loading", run.models, self.mesh.device)
            agree.sync(f"models {weights}")
            targets = [Target(name, model, (model,)) for name, model in zip(run.peers, models, strict=True)]
            voters = [one for one, spec in zip(targets, self.config.peers, strict=True) if not spec.frozen]
            ensemble = run.ensemble(models=models)
            targets.append(Target(ENSEMBLE, ensemble, (ensemble,), tuple(voters) if len(voters) == 1 else ()))
            work = Work(self.config, job, targets, data, samples_N, f"{what}{', averaged weights' * (weights == EMA)}")
            found[weights] = run_chunks(work, self.mesh, self.stop, self.reporter)
        return found

    def opened(self, manifest: Manifest, weights: str) -> FinishedRun:
        """One of this run's checkpoints."""
        return FinishedRun(self.run.folder, self.config, manifest, weights)

    def about(self, manifest: Manifest, job: Job, label: str, split: str) -> dict[str, Any]:
        """What a result file says about an evaluation."""
        run = self.opened(manifest, RAW)
        return about_run(run, label, device_name(self.mesh.device)) | about_job(job, self.config.eval.chunk) | {
            "split": split, "names": [*run.peers, ENSEMBLE], "ensemble": self.config.eval.ensemble,
            "data_digest": self.data.digest, "attempt": self.run.attempt}

    def note(self, text: str) -> None:
        """Tell the person at the console, and the log."""
        self.run.log.info("%s", text)
        self.reporter.note(text)

    def show_gallery(self, group: str, manifest: Manifest, data: ImageSet, job: Job,
                     targets: Sequence[TargetResult]) -> None:
        """Send pictures of a checkpoint's AEs where they are wanted. What goes wrong is a note, not an error."""
        if not self.reporter.wants_pictures:
            return
        try:
            weights = targets[-1].weights  # averaged ones come last
            found = gallery(self.opened(manifest, weights), data, job, targets, self.mesh.device)
        except Exception as error:  # an extra of rank 0 alone: the other ranks would wait for it in vain
            self.note(f"warning: no pictures of step {manifest.step}: {type(error).__name__}: {error}")
            return
        self.reporter.pictures(manifest.step, f"gallery_{group}", found)

    @property
    def scored_by(self) -> str:
        """What scores are under now: a resumed run may have other settings of `eval`."""
        images = len(chosen_images(len(self.data.val), self.config.eval.size))
        return f"{attack_name(self.job(self.config.eval.steps))} on {images} images"

    def _score_again(self, job: Job) -> None:
        """Attack the best checkpoint as this evaluation does, where its score is of another attack or of other images:
        the two could not be compared. One that is damaged gives its place to the next."""
        best = read_best(self.run.folder) if self.mesh.placement.is_lead else None
        step = self.mesh.from_lead(best.step if best and best.attack not in ("", self.scored_by) else None)
        if step is None:
            return
        agree = Agreement(self.mesh, f"validation of the best checkpoint, step {step}")
        manifest, found = agree.run("manifest", load_manifest, self.run.folder, step), None
        agree.sync("best checkpoint")
        with suppress(CheckpointError):
            found = self.attack(manifest, job, "val", self.config.eval.size)
        if best is not None:
            agree.run("score", self._mark_again, best, manifest, job, found)
        agree.sync("score")

    def _mark_again(self, best: Best, manifest: Manifest, job: Job, found: Found | None) -> None:
        """The score of the best checkpoint under the present attack; none is below all others."""
        self.run.check_owner()
        score = -1.0
        if found is not None:
            document = document_of(self.about(manifest, job, step_name(best.step), "val"), found, checked=False)
            score = selection_score(as_result(document).targets, self.config.peers)
            write_result(self.run.folder.eval, validation_file(self.run.folder, best.step).stem, document)
        mark_best(self.run.folder, best.step, score, self.scored_by)
        self.note(f"step {best.step}, the best so far, had {100 * best.score:.1f} % under {best.attack}; under "
                  f"{self.scored_by} it has " + (f"{100 * score:.1f} %" if found else "none, because it is damaged"))

    def _record_validation(self, manifest: Manifest, document: Mapping[str, Any], targets: Sequence[TargetResult],
                           record: Mapping[str, Any]) -> None:
        """The result file comes last: where it is missing, a resumed run evaluates again."""
        self.run.check_owner()
        folder, score, step = self.run.folder, selection_score(targets, self.config.peers), manifest.step
        best = read_best(folder)
        if best is None or score > best.score:
            mark_best(folder, step, score, self.scored_by)
        else:
            step, score = best.step, best.score
        self.reporter.epoch({**record, "best": {"step": step, "score": score}})
        write_result(folder.eval, validation_file(folder, manifest.step).stem, document)


def selection_score(targets: Sequence[TargetResult], specs: Sequence[PeerConfig]) -> float:
    """What `best` maximises on the validation split: mean robust accuracy of the `candidates`, with averaged weights
    where they are kept."""
    names = candidates(specs)
    peers = [one for one in targets if one.target in names]
    chosen = [one for one in peers if one.weights == EMA] or peers
    return sum(one.accuracy[UNION] for one in chosen) / len(chosen)


def validation_record(targets: Sequence[TargetResult]) -> dict[str, Any]:
    """Accuracies of the peers and the ensemble, with raw and with averaged weights (None where none are kept).

    `threat_acc` is under each threat by itself, `robust_acc` under all of them: their union where there are several.
    """
    record: dict[str, Any] = {}
    for prefix, weights in (("", RAW), ("ema_", EMA)):
        peers = {one.target: one.accuracy for one in targets if one.weights == weights}
        ensemble = peers.pop(ENSEMBLE, None)
        record[f"{prefix}clean_acc"] = [shares[CLEAN] for shares in peers.values()] or None
        record[f"{prefix}robust_acc"] = [shares[UNION] for shares in peers.values()] or None
        record[f"{prefix}threat_acc"] = {threat: [shares[threat] for shares in peers.values()]
                                         for threat in targets[0].attacks} if peers else None
        if ensemble:
            record[f"{prefix}ensemble"] = {"clean_acc": ensemble[CLEAN], "robust_acc": ensemble[UNION],
                                           "threat_acc": {threat: ensemble[threat] for threat in targets[0].attacks}}
    return record


def attack_name(job: Job) -> str:
    """PGD-20, or cr."""
    return f"PGD-{job.plans['pgd'].steps}" if job.plans else job.attacks[0]


def collapsed(chunks: Chunks, specs: Sequence[PeerConfig]) -> list[str]:
    """Peers that train and give images of several classes a single one: what they see no longer reaches their logits. A
    rate that is too high does that in the first epochs, and it hardly ever comes back."""
    if len({label for chunk in chunks for label in chunk["labels"]}) == 1:
        return []
    said = {str(spec.name): {guess for chunk in chunks for guess in chunk["predictions"][str(spec.name)][CLEAN]}
            for spec in specs if not spec.frozen}
    return [name for name, guesses in said.items() if len(guesses) == 1]


def own_robust(targets: Sequence[TargetResult], specs: Sequence[PeerConfig]) -> list[float | None]:
    """Each peer's accuracy against its own threat, with raw weights, in [0, 1]; None for one that does not train."""
    found = {one.target: one.accuracy for one in targets if one.weights == RAW}
    return [None if spec.frozen else found[str(spec.name)][Threat(spec.threat.norm, spec.threat.eps).label]
            for spec in specs]


def final_table(attack: str, found: Mapping[str, Sequence[TargetResult]]) -> Table:
    """A row per checkpoint (`best`, `last`, or both in one) and target."""
    shown = accuracies(next(iter(found.values()))[0].attacks)
    table = new_table(f"Accuracy on the test set, under {attack}", ("target", "weights", "checkpoint"),
                      (*(f"{name} %" for name in shown), "n"))
    for checkpoint, targets in found.items():
        for one in targets:
            table.add_row(one.target, "EMA" if one.weights == EMA else "raw", checkpoint,
                          *(percent(one.accuracy[name], 2) for name in shown), str(one.n))
    return table


def gallery(run: FinishedRun, data: ImageSet, job: Job, targets: Sequence[TargetResult],
            device: torch.device) -> list[Picture]:
    """Of the first images of a split: up to half whose AE fools the most robust peer, then others, in their order.

    Perturbations are scaled: 0 is grey, the largest pixel of each is white or black.
    """
    trained = {str(spec.name): spec for spec in run.config.peers if not spec.frozen}
    best = max((one for one in targets if one.weights == run.weights and one.target in trained),
               key=lambda one: one.accuracy[UNION]).target
    model, threat = run.peer(best, device), trained[best].threat
    x_BCHW, y_B = pixels(data, torch.arange(min(LOOKED_AT, len(data))), device, run.config)
    with strict_arithmetic():
        adv_BCHW = craft(model, x_BCHW, y_B, Threat(threat.norm, threat.eps),
                           AttackPlan(run.config.eval.steps, 1), seed=job.seed, chunk=0)
        clean_B, attacked_B = predict(model, x_BCHW), predict(model, adv_BCHW)
    return [Picture(x_BCHW[row], scaled(adv_BCHW[row] - x_BCHW[row]), adv_BCHW[row], f"class {int(y_B[row])}, {best} "
                    f"says {int(clean_B[row])}, under attack {int(attacked_B[row])}")
            for row in shown_rows((clean_B == y_B) & (attacked_B != y_B))]
