"""What a training asks of the evaluator: its validation, its tests, and pictures of adversarial examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from mat_dist.attacks.norms import Threat
from mat_dist.checkpoints import Manifest, mark_best, read_best, step_name
from mat_dist.config.schema import Config, PeerConfig
from mat_dist.data import DataSets, ImageSet
from mat_dist.distributed.agreement import Agreement
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import CheckpointError
from mat_dist.evaluation.attacks import (
    EMA,
    ENSEMBLE,
    RAW,
    AttackPlan,
    Result,
    evaluate,
    load_models,
    pixels,
    restarts,
    selection_score,
    strict_arithmetic,
    threats_of,
)
from mat_dist.evaluation.results import write_results
from mat_dist.models.classifier import Images
from mat_dist.runs.console import TableRow
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.metrics import Picture, Reporter
from mat_dist.runs.session import Run

PICTURES = 6
LOOKED_AT = 64  # images of which the pictures are chosen


class Evaluations:
    """What the training asks of the evaluator. Every rank calls the methods; rank 0 writes and shows.

    Args:
        config: of the run.
        mesh: the other ranks.
        run: the open run folder.
        data: the splits.
        stop: set by a signal.
        reporter: where numbers and pictures go.
    """

    def __init__(self, config: Config, mesh: Mesh, run: Run, data: DataSets, stop: StopFlag,
                 reporter: Reporter) -> None:
        self.config, self.mesh, self.run, self.data, self.stop = config, mesh, run, data, stop
        self.reporter = reporter

    def lacks(self, done: int) -> bool:
        """Whether the checkpoint of step `done` has not been evaluated on the validation split."""
        return self.mesh.from_lead(not validation_file(self.run.folder, done).exists())

    def validate(self, done: int, manifest: Manifest, progress: Mapping[str, Any]) -> list[float | None]:
        """Attack the checkpoint of step `done` on the validation split; mark it where it is the best so far.

        Args:
            progress: what the record of this evaluation begins with: step, epoch, lr.

        Returns:
            Each peer's robust accuracy against its own threat, with raw weights, in [0, 1]; None for a peer that does
            not train.

        Raises the error of any rank, on all ranks; StopRequested when any rank was asked to stop before it was done.
        """
        began = perf_counter()
        plan = AttackPlan(self.config.eval.steps, self.config.eval.restarts, self.config.eval.step_size)
        results = evaluate(self.config, self.mesh, manifest, self._images(manifest), self.data.val, plan,
                           size=self.config.eval.size, purpose="validation", stop=self.stop)
        score = selection_score(results, self.config.peers)
        agree = Agreement(self.mesh, f"validation after step {done}", done)
        if self.mesh.placement.is_lead:
            record = {**progress, "eval_s": perf_counter() - began, **validation_record(results)}
            agree.run("records", self._record_validation, manifest, record, results, plan, score)
            self.show_gallery("validation", manifest, self.data.val, plan, results)
        agree.settle("records")
        return own_robust(results, self.config.peers)

    def finish(self, best: Manifest | None, newest: Manifest) -> None:
        """Attack the best (if there were evaluations) and the newest checkpoint on the test set, show the table.

        A damaged one does not keep the other from its result; its error comes last.
        """
        plan = AttackPlan(self.config.eval.test_steps, self.config.eval.restarts, self.config.eval.step_size)
        chosen = {**({"best": best} if best else {}), "last": newest}
        rows: list[TableRow] = []
        done: dict[int, list[Result]] = {}
        damaged: CheckpointError | None = None
        for label, manifest in chosen.items():
            try:
                if manifest.step not in done:
                    self.note(f"attacking {manifest.directory.name} ({label}) on the test set: PGD-{plan.steps}")
                    done[manifest.step] = evaluate(self.config, self.mesh, manifest, self._images(manifest),
                                                   self.data.test, plan, size=self.config.eval.test_size,
                                                   purpose="test", stop=self.stop)
            except CheckpointError as error:
                damaged = error
                continue
            results = done[manifest.step]
            if self.mesh.placement.is_lead:
                write_results(self.run.folder.eval, f"test_{label}_{manifest.directory.name}", results,
                              config=self.config, attack=plan, step=manifest.step, split="test",
                              attempt=self.run.attempt, per_sample=True)
                self.show_gallery(f"test_{label}", manifest, self.data.test, plan, results)
            rows += table_rows(label, results, plan)
        if rows:
            self.reporter.table(rows)
        if damaged is not None:
            raise damaged

    def note(self, text: str) -> None:
        """Tell the person at the console, and the log."""
        self.run.log.info("%s", text)
        self.reporter.note(text)

    def show_gallery(self, group: str, manifest: Manifest, data: ImageSet, plan: AttackPlan,
                     results: Sequence[Result]) -> None:
        """Send pictures of a checkpoint's AEs where they are wanted. What goes wrong is a note, not an error."""
        if not self.reporter.wants_pictures:
            return
        try:
            found = gallery(self.config, manifest, self._images(manifest), data, plan, results, self.mesh.device)
        except Exception as error:  # an extra of rank 0 alone: the other ranks would wait for it in vain
            self.note(f"warning: no pictures of step {manifest.step}: {type(error).__name__}: {error}")
            return
        self.reporter.pictures(manifest.step, f"gallery_{group}", found)

    def _record_validation(self, manifest: Manifest, record: Mapping[str, Any], results: Sequence[Result],
                           plan: AttackPlan, score: float) -> None:
        """The result file comes last: where it is missing, a resumed run evaluates again."""
        best = read_best(self.run.folder)
        if best is None or score > best.score:
            mark_best(self.run.folder, manifest.step, score, {"split": "validation"})
        self.reporter.epoch(record)
        write_results(self.run.folder.eval, validation_file(self.run.folder, manifest.step).stem, results,
                      config=self.config, attack=plan, step=manifest.step, split="validation",
                      attempt=self.run.attempt)

    def _images(self, manifest: Manifest) -> Images:
        return Images.of(manifest.meta.extra["images"])


def validation_file(folder: RunFolder, step: int) -> Path:
    """The result of a step's evaluation on the validation split."""
    return folder.eval / f"validation_{step_name(step)}.json"


def validation_record(results: Sequence[Result]) -> dict[str, Any]:
    """Accuracies of the peers and the ensemble, with raw and with averaged weights (None where none are kept)."""
    record: dict[str, Any] = {}
    for prefix, weights in (("", RAW), ("ema_", EMA)):
        chosen = [r for r in results if r.weights == weights]
        record[f"{prefix}clean_acc"] = [r.clean for r in chosen if r.target != ENSEMBLE] or None
        record[f"{prefix}robust_acc"] = [r.robust for r in chosen if r.target != ENSEMBLE] or None
        for r in chosen:
            if r.target == ENSEMBLE:
                record[f"{prefix}ensemble"] = {"clean_acc": r.clean, "robust_acc": r.robust}
    return record


def own_robust(results: Sequence[Result], specs: Sequence[PeerConfig]) -> list[float | None]:
    """Each peer's accuracy against its own threat, with raw weights, in [0, 1]; None for one that does not train."""
    threats, found = threats_of(specs), {r.target: r for r in results if r.weights == RAW}
    return [None if p.frozen else found[str(p.name)].against(threats.index(Threat(p.threat.norm, p.threat.eps)))
            for p in specs]


def table_rows(checkpoint: str, results: Sequence[Result], attack: AttackPlan) -> list[TableRow]:
    """Rows of the final table for one checkpoint (`best` or `last`)."""
    return [TableRow(target=r.target, weights="EMA" if r.weights == EMA else "raw", checkpoint=checkpoint,
                     clean_acc=r.clean, robust_acc=r.robust, pgd_steps=attack.steps, images=len(r.clean_N))
            for r in results]


# ------------------------------------------------------------------------------------------------ pictures

def gallery(config: Config, manifest: Manifest, images: Images, data: ImageSet, plan: AttackPlan,
            results: Sequence[Result], device: torch.device) -> list[Picture]:
    """Of the first images of a split: up to half whose AE fools the most robust peer, then others, in their order.

    Perturbations are scaled: 0 is grey, the largest pixel of each is white or black.
    """
    weights = EMA if any(r.weights == EMA for r in results) else RAW
    trained = [str(p.name) for p in config.peers if not p.frozen]
    best = max((r for r in results if r.weights == weights and r.target in trained), key=lambda r: r.robust)
    index = [str(p.name) for p in config.peers].index(best.target)
    model = load_models(config, manifest, images, weights, device)[index]
    spec = config.peers[index].threat
    x_BCHW, y_B = pixels(data, torch.arange(min(LOOKED_AT, len(data))), device, config)
    with strict_arithmetic():
        adv_BCHW = next(restarts(model, x_BCHW, y_B, Threat(spec.norm, spec.eps), plan, seed=config.run.seed, chunk=0))
        with torch.no_grad():
            clean_B, attacked_B = model(x_BCHW).argmax(-1), model(adv_BCHW).argmax(-1)
    fooled = ((clean_B == y_B) & (attacked_B != y_B)).nonzero()[:, 0].tolist()[:PICTURES // 2]
    rest = [row for row in range(len(y_B)) if row not in fooled][:PICTURES - len(fooled)]
    found = []
    for row in (*fooled, *rest):
        change = adv_BCHW[row] - x_BCHW[row]
        grey = 0.5 + change / (2 * (float(change.abs().amax()) or 1.0))
        found.append(Picture(x_BCHW[row], grey, adv_BCHW[row], f"class {int(y_B[row])}, {best.target} says "
                             f"{int(clean_B[row])}, under attack {int(attacked_B[row])}"))
    return found
