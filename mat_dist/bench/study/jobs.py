"""Runs of a study, some at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import closing
from typing import Any

from mat_dist.bench.study.runs import Enough, Job, Runner
from mat_dist.errors import MatError

Task = tuple[Job, Callable[[], Any]]


def run_all(tasks: Sequence[Task], jobs: int, runner: Runner, ended: Callable[[int, MatError | None], None],
            write: Callable[[], None]) -> None:
    """Run tasks, `jobs` at a time; one that fails stops no other.

    Args:
        ended: called with the number of each task that has ended, and the error of one that failed.
        write: called after that, as long as the time is not over.

    Raises:
        Enough: the time was over; what was under way has saved.
    """
    over = False
    with closing(side_by_side(tasks, jobs)) as finished, runner.ending():
        for number, future in finished:
            failure = None
            try:
                future.result()
            except Enough:
                over = True
            except MatError as error:
                failure = error
                runner.tell(f"warning: {tasks[number][0].row}, seed {tasks[number][0].seed}: {error}")
            ended(number, failure)
            if not over:
                write()
    if over:
        raise Enough


def side_by_side(tasks: Sequence[Task], jobs: int) -> Generator[tuple[int, Future[Any]]]:
    """Run tasks, `jobs` at a time, begun in their order; one whose job needs the run of another waits for that.

    Returns:
        (number of the task, its ended future), as they end. Close it (`contextlib.closing`) to begin no more.
    """
    futures: list[Future[Any]] = []

    def after(needed: Sequence[Future[Any]], task: Callable[[], Any]) -> Any:
        wait(needed)  # begun before this one, so it ends without it
        return task()

    if jobs == 1:  # in the caller's thread
        for number, (_, task) in enumerate(tasks):
            ended: Future[Any] = Future()
            try:
                ended.set_result(task())
            except (Enough, MatError) as error:
                ended.set_exception(error)
            yield number, ended
        return
    with ThreadPoolExecutor(jobs) as pool:
        for job, task in tasks:
            needed = [future for (other, _), future in zip(tasks, futures, strict=False)
                      if other.seed == job.seed and other.row in job.needs]
            futures.append(pool.submit(after, needed, task))
        numbers = {future: number for number, future in enumerate(futures)}
        try:
            for future in as_completed(futures):
                yield numbers[future], future
        finally:  # where the caller fails, what has not begun never does
            pool.shutdown(wait=False, cancel_futures=True)
