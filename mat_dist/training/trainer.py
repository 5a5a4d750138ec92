"""Training from the first step, or the newest checkpoint, to the final table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from time import perf_counter
from typing import Any, Protocol

from mat_dist import checkpoints
from mat_dist.checkpoints.load import check_resumed, initialise, restore
from mat_dist.checkpoints.saver import Saver
from mat_dist.config import binding, with_absolute_paths
from mat_dist.config.schema import Config
from mat_dist.core.cohort import Cohort
from mat_dist.core.step import Ask, Batch, Outcome, train_step
from mat_dist.data import DataSets, channel_stats, steps_per_epoch, training_batches
from mat_dist.distributed.agreement import Agreement
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.stopping import AGAIN, StopFlag
from mat_dist.errors import NonFinite, OutputError, PeerFailed, StopRequested
from mat_dist.models.registry import DTYPES, Images
from mat_dist.runs.metrics import Reporter, device_memory
from mat_dist.runs.session import Run
from mat_dist.training.capture import captured_steps
from mat_dist.training.feed import Feed
from mat_dist.training.monitor import Meter, Watch, step_record, wait_shares

MOST_OVERFLOWS = 24  # in a row: by then a loss scale of 2^16 is 2^-8
MOST_REFUSED, WINDOW = 3, 100  # refused steps that are borne within so many steps


class Evaluations(Protocol):
    """What the training needs of the evaluator (mat_dist/evaluation/during_training.py); called on every rank."""

    reporter: Reporter

    def begin(self, first: int, total: int, evaluates_at: Callable[[int], bool]) -> None:
        """Steps `first` .. total - 1 come next, and evaluations after some of them."""

    def lacks(self, done: int) -> bool:
        """Whether the checkpoint of step `done` has not been evaluated."""

    def validate(self, done: int, manifest: checkpoints.Manifest, progress: Mapping[str, Any]) -> list[float | None]:
        """Attack a checkpoint on the validation split, mark the best -> each peer's robust accuracy, own threat."""

    def finish(self, best: checkpoints.Manifest | None, newest: checkpoints.Manifest) -> None:
        """Attack the best and the newest checkpoint on the test set, and show the table."""


class Trainer:
    """One rank's part of a run.

    Args:
        config: resolved settings.
        mesh: the other ranks.
        run: the open run folder.
        data: the splits.
        stop: set by a signal.
        evaluations: what attacks checkpoints; its reporter is told of the steps too.
    """

    def __init__(self, config: Config, mesh: Mesh, run: Run, data: DataSets, stop: StopFlag,
                 evaluations: Evaluations) -> None:
        self.config, self.mesh, self.run, self.data, self.stop = config, mesh, run, data, stop
        self.images = Images(data.train.shape, len(data.classes), *channel_stats(data.train))
        steps = steps_per_epoch(len(data.train), config.train.batch_size, config.data.generated_share,
                                config.train.replays)
        self.cohort = Cohort.build(config, mesh, self.images, steps_per_epoch=steps)
        self.batches = training_batches(config, data, mesh.device, DTYPES[config.step.precision], self.cohort.rows)
        self.cohort.shown = lambda step: self.batches.shown(step // config.train.replays)
        self.evaluations, self.reporter = evaluations, evaluations.reporter
        self.saver = Saver(run, keep=config.checkpoint.keep, note=self.note, tell=self.reporter.tell)
        self.feed = Feed(self.cohort, self.batches, config.train.replays)
        self.compute = self.feed.behind(captured_steps(self.cohort, self.note))
        self.overflows = 0  # steps in a row whose scaled gradient was too large for fp16
        self.refused: list[int] = []  # the newest steps that the vote refused
        self.watch = Watch(len(config.peers))

    def fit(self) -> None:
        """Train to the end, evaluate, print the table. Raises StopRequested after a signal, saved."""
        first = self.resume()
        self.evaluations.begin(first, self.cohort.total_steps, self.evaluates_at)
        try:
            for note in [f"run folder: {self.run.folder.path}", *self.run.notes, *self.data.notes]:
                self.note(note)
            if self.lacks_evaluation(first):
                self.validate(first)
            self.train(first)
            if self.config.eval.test_steps and self.saver.newest is not None:
                self.evaluations.finish(self.best(), self.saver.newest)
        except (NonFinite, PeerFailed):
            self.saver.finish()  # all ranks are here with one text: what is written becomes a checkpoint
            raise
        finally:
            self.saver.close()
            self.reporter.close()

    def train(self, first: int) -> None:
        """Steps `first` .. total - 1 with their records, checkpoints and evaluations."""
        total, per_epoch, meter = self.cohort.total_steps, self.cohort.steps_per_epoch, Meter()
        for done in range(first + 1, total + 1):
            began = perf_counter()
            batch = self.feed.fetch(done - 1)
            fetched = perf_counter()
            outcome = self.step(batch, log=any(done % n == 0 for n in (self.config.log.every, per_epoch, total)))
            seconds = outcome.seconds | {"data": fetched - began + outcome.seconds.get("data", 0.0)}
            meter.add(seconds, perf_counter() - began)
            self.tell()
            if outcome.loss_P is not None:
                self.log(done, outcome, meter)
                meter = Meter()
            if self.saver.pending and outcome.ready:
                self.saver.finish()
            evaluates = self.evaluates_at(done)
            if self.saves_at(done, outcome.stop):
                needed = outcome.stop or done == total
                self.save(done, needed=needed, wait=needed or evaluates)
            if outcome.stop and done < total:
                reason = next(filter(None, self.mesh.gather_json(self.stop.reason)), "stopped by a signal")
                raise StopRequested(f"{reason}, saved after step {done}", str(self.run.folder.path), AGAIN)
            if evaluates:
                self.validate(done)

    def step(self, batch: Batch, *, log: bool) -> Outcome:
        """One step of the cohort; a non-finite one ends the run or, a few times, is left out, as the settings say."""
        try:
            outcome = train_step(self.cohort, batch, log=log, ask=Ask(self.stop.requested, self.saver.ready),
                                 compute=self.compute)
            self.overflows = 0
            return outcome
        except NonFinite as error:
            if self.overflowed(error):
                return Outcome(ready=False)
            self.refused = [s for s in self.refused if s > batch.step - WINDOW] + [batch.step]
            if self.config.step.on_nonfinite == "abort" or len(self.refused) > MOST_REFUSED:
                raise
            count = f"{len(self.refused)} of at most {MOST_REFUSED} in {WINDOW}"
            self.note(f"warning: step {batch.step} left out ({count}): {error.what}")
            return Outcome(ready=False)

    def overflowed(self, error: NonFinite) -> bool:
        """Whether it is the loss scale of fp16 that was too large: it is halved then, and the step left out."""
        if self.config.step.precision != "fp16" or error.stage != "gradient" or self.overflows > MOST_OVERFLOWS:
            return False
        self.overflows += 1
        for peer in self.cohort.peers:
            if peer.index in error.peers:
                peer.scale.after(overflow=True)
        return True

    def note(self, text: str) -> None:
        """Tell the person at the console, and the log."""
        self.run.log.info("%s", text)
        self.reporter.note(text)

    def tell(self) -> None:
        """Tell what the local peers noted."""
        for peer in self.cohort.peers:
            while peer.notes:
                self.note(peer.notes.pop(0))

    def log(self, done: int, outcome: Outcome, meter: Meter) -> None:
        """Report a log step, and what is unusual about it."""
        phases = self.mesh.gather_json(meter.means())
        record = {**self.progress(done), **step_record(outcome, meter, self.config.train.batch_size),
                  "phases_s": phases, "wait_share": wait_shares(phases), **device_memory(self.mesh.device)}
        self.run.together("run folder", self.run.check_owner)
        try:
            self.reporter.log(record)
        except OutputError as error:  # a full disk stops a run only where it cannot save
            self.note(f"warning: no record of step {done}: {error}")
        self.reporter.tell("step", record)
        for line in self.watch.lines(done, record, phases):
            self.note(line)

    def progress(self, done: int) -> dict[str, Any]:
        """What all records share: how far the training is, and each peer's learning rate."""
        return {"step": done, "epoch": done / self.cohort.steps_per_epoch,
                "lr": [self.cohort.lr(spec, done - 1) for spec in self.config.peers]}

    def saves_at(self, done: int, stopping: bool) -> bool:
        """Whether a checkpoint is due after `done` steps."""
        when, total = self.config.checkpoint, self.cohort.total_steps
        due = (self.cohort.steps_per_epoch * when.every, when.every_steps or total, total)
        return stopping or any(done % number == 0 for number in due) or self.evaluates_at(done)

    def evaluates_at(self, done: int) -> bool:
        """Whether an evaluation is due after `done` steps; it reads the checkpoint of that step."""
        every = self.config.eval.every * self.cohort.steps_per_epoch
        return every > 0 and (done % every == 0 or done == self.cohort.total_steps)

    def lacks_evaluation(self, done: int) -> bool:
        """Whether an earlier attempt ended between the checkpoint of step `done` and its evaluation."""
        return done > 0 and self.evaluates_at(done) and self.evaluations.lacks(done)

    def best(self) -> checkpoints.Manifest | None:
        """The checkpoint that the validation split chose; None if there was no evaluation."""
        agree = Agreement(self.mesh, "test")
        marked = checkpoints.read_best(self.run.folder) if self.mesh.placement.is_lead else None
        step = self.mesh.from_lead(marked.step if marked else None)
        manifest = None if step is None else agree.run("best", checkpoints.load_manifest, self.run.folder, step)
        agree.sync("best checkpoint")
        return manifest

    def save(self, done: int, *, needed: bool, wait: bool) -> None:
        """All peers into `checkpoints/step_<done>`. `needed`: the run ends here, so that a full disk is an error."""
        told = with_absolute_paths(self.config)
        meta = checkpoints.Meta(
            epoch=done // self.cohort.steps_per_epoch, peers=tuple(str(p.name) for p in self.config.peers),
            config_digest=checkpoints.json_digest(binding(told)), data_digest=self.data.digest, extra={
                "classes": list(self.data.classes), "images": asdict(self.images), "plugins": self.run.plugins,
                "settings": told.model_dump(mode="json", exclude={"run": {"name", "root"}})})
        self.run.together("averaged weights", self.prepare, done)
        states = {peer.index: peer.state for peer in self.cohort.peers}
        if not wait:
            self.saver.start(done, meta, states)
        elif not self.saver.save(done, meta, states) and needed:
            raise OutputError(f"the state after step {done} could not be saved", str(self.run.folder.checkpoints),
                              "free space, then start again to continue from the newest checkpoint")

    def prepare(self, done: int) -> None:
        """Before a save: a failed update is told; hooks may want to see training images."""
        if self.cohort.failure is not None:
            raise self.cohort.failure
        batches = training_batches(self.config, self.data, self.mesh.device, DTYPES[self.config.step.precision])
        for hook in (hook for peer in self.cohort.peers for hook in peer.hooks):
            hook.before_save(done, (batches.at(number)[0] for number in range(batches.steps_per_epoch)))

    def resume(self) -> int:
        """Load the newest complete checkpoint if there is one -> the number of steps already done."""
        agree = Agreement(self.mesh, "resume")
        agree.run("run folder", self.run.check_owner)
        found = None
        if self.mesh.placement.is_lead:
            newest = agree.run("search", checkpoints.find_newest, self.run.folder)
            agree.run("settings", check_resumed, newest[0] if newest else None, self.run, self.config, self.data.digest,
                      self.cohort.total_steps)
            if newest is not None:
                adopted = agree.run("search", checkpoints.adopt, self.run.folder, newest[0])
                found = {"step": newest[0].step, "notes": [*newest[1], *(adopted or [])]}
        agree.sync("search")
        found = self.mesh.from_lead(found)
        if found is None:
            self.run.together("initial weights", initialise, self.cohort.peers, self.images)
            return 0
        manifest = agree.run("manifest", checkpoints.load_manifest, self.run.folder, found["step"])
        for peer in self.cohort.peers:
            agree.run(f"loading {peer.name}", restore, peer, manifest)
        agree.sync("loading")
        self.saver.newest = manifest
        self.run.notes += [*found["notes"], f"continuing after step {found['step']} of {self.cohort.total_steps}"]
        return int(found["step"])

    def validate(self, done: int) -> None:
        """Evaluate the checkpoint of step `done` on the validation split, keep the best."""
        if self.saver.newest is None or self.saver.newest.step != done:
            return self.note(f"warning: no evaluation after step {done}, since there is no checkpoint of it")
        for line in self.watch.overfitting(self.evaluations.validate(done, self.saver.newest, self.progress(done))):
            self.note(line)
        if done == self.cohort.total_steps and self.evaluations.lacks(done):
            raise OutputError(f"the evaluation after step {done} could not be saved", str(self.run.folder.eval),
                              "free space, then start again to make up for it")
