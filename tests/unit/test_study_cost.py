"""What rows cost, against passes counted by hand, and that each row has a control at equal cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import evidence
from benchmarks.study.__main__ import main, read_options
from benchmarks.study.cost import relative_cost
from benchmarks.study.evidence import planned
from benchmarks.study.pages import verdict_lines
from benchmarks.study.tables import Entry, comparisons, table_document
from mat_dist.config import load_config
from mat_dist.errors import ConfigError

# 100 steps of 64 images, 7 attack passes. A peer alone: 8 forward and backward passes a step. mat with two peers: each
# learns on its own AEs and on the other's, 9 and 9. Only forward passes of frozen teachers: 1 and 1.
PLAN = """
suites:
  cpu:
    config: digits
    settings: [train.max_steps=100, train.epochs=100, train.batch_size=64, attack.steps=7, eval.test_steps=0]
    seeds: [0, 1]
    tables:
      main:
        title: Costs
        primary: pgd
        controls: [at_x2]
        evaluations:
          pgd: {settings: [attacks=pgd, steps=2, images=30, checks=0, transfer=false, eval.chunk=30]}
        rows:
          at: {says: alone, settings: [loss=at]}
          at_x2: {says: two alone, peers: 2, settings: [loss=at]}
          at_long: {says: alone and longer, settings: [loss=at, train.max_steps=225]}
          mat: {says: mutual, peers: 2, control: at_long, settings: [loss=mat]}
          taught:
            says: of two finished peers
            peers: 3
            control: at_long
            settings: [loss=at, peers.0.loss=mat_kd, peers.1.frozen=true, peers.2.frozen=true,
                       "peers.1.init_from=RUN(at_x2):peer0", "peers.2.init_from=RUN(at_x2):peer1"]
"""
MAT = 36 * 100 * 64
AT = 16 * 100 * 64
TAUGHT = 18 * 100 * 64  # of its own: 10 forward, 8 backward


def plan(folder: Path, *changes: tuple[str, str]) -> list[str]:
    """The words of a command with the plan above, changed."""
    text = PLAN
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    (folder / "plan.yaml").write_text(text)
    return ["evidence", "--file", str(folder / "plan.yaml"), "--root", str(folder / "runs"), "--out", str(folder)]


def entries(words: list[str]) -> dict[str, Entry]:
    return {entry.name: entry for entry in planned(read_options(words))[1]}


def problems(words: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        planned(read_options(words))
    return [str(one) for one in caught.value.problems]


LONGER = ("train.max_steps=225", "train.max_steps=315")  # 50 more for `taught`: 18 of its own and 32 of at_x2


def test_a_row_costs_its_passes_and_those_of_the_rows_that_it_starts_from(tmp_path: Path) -> None:
    """Each of these once, though two peers come from it, times its own cost factor."""
    found = entries(plan(tmp_path, LONGER, ("peers: 2, settings: [loss=at]", "peers: 2, cost_factor: 1.0, settings: "
                                            "[loss=at]")))
    assert {name: entry.cost for name, entry in found.items()} == {
        "at": AT, "at_x2": 2 * AT, "at_long": 3.15 * AT, "mat": MAT, "taught": TAUGHT + 2 * AT}
    wide = entries(plan(tmp_path, ("225", "400"), ("says: two alone,", "says: two alone, cost_factor: 1.25,")))
    assert wide["at_x2"].cost == 2.5 * AT and wide["taught"].cost == TAUGHT + 2.5 * AT


def test_a_row_pays_for_rows_behind_those_that_it_starts_from(tmp_path: Path) -> None:
    """`last` starts from `taught`, which starts from `at_x2`."""
    more = """          last:
            says: of a taught peer
            peers: 2
            settings: [loss=at, peers.0.loss=mat_kd, peers.1.frozen=true, "peers.1.init_from=RUN(taught):peer0"]
          at_x2:"""
    found = entries(plan(tmp_path, LONGER, ("          at_x2:", more)))
    assert found["last"].cost == 17 * 100 * 64 + TAUGHT + 2 * AT
    assert [one.name for one in found["last"].sources()] == ["taught", "at_x2"]


def test_a_larger_batch_costs_more(tmp_path: Path) -> None:
    shown = "says: alone, settings: ["
    found = entries(plan(tmp_path, LONGER, (shown, f"{shown}train.batch_size=128, ")))
    assert found["at"].cost == 2 * AT


@pytest.mark.parametrize("steps", [214, 215, 300])
def test_a_control_may_cost_a_twentieth_less_and_any_amount_more(steps: int, tmp_path: Path) -> None:
    """mat costs as much as 225 steps of one peer: 225 / 1.05 = 214.3."""
    words = plan(tmp_path, ("train.max_steps=225", f"train.max_steps={steps}"), ("            control: at_long\n", ""))
    if steps > 214:
        found = entries(words)
        assert relative_cost(found["mat"], found["at_long"]) == pytest.approx(225 / steps)
    else:
        (told,) = problems(words)
        assert "at_long costs less than mat, which costs 1.05 times as much" in told


def test_all_rows_without_a_control_at_equal_cost_are_told_with_other_mistakes_and_lines(tmp_path: Path) -> None:
    """mat has none, `taught` a cheaper one by what it starts from, and one column is misspelt."""
    words = plan(tmp_path, ("mutual, peers: 2, control: at_long", "mutual, peers: 2"), ("primary: pgd", "primary: pg"))
    lines = (tmp_path / "plan.yaml").read_text().splitlines()
    row, control, primary = (1 + next(n for n, line in enumerate(lines) if text in line)
                             for text in ("mat: {", "control: at_long", "primary"))
    told = problems(words)
    assert len(told) == 3
    for line, text in ((row, "mat has no control, and its peers learn from each other"),
                       (control, "at_long costs less than taught, which costs 1.39 times as much"),
                       (primary, "there is no 'pg'")):
        (one,) = [problem for problem in told if f"plan.yaml:{line}," in problem]
        assert text in one


@pytest.mark.parametrize(("changes", "message"), [
    ([("control: at_long, settings", "control: nobody, settings")], "there is no 'nobody' in this table"),
    ([("control: at_long, settings", "control: mat, settings")], "mat is its own control"),
    ([("RUN(at_x2):peer1", "RUN(absent):peer1")], "RUN(absent) names no row of the suite"),
    ([("RUN(at_x2):peer1", "RUN(taught):peer1")], "taught starts from runs that start from its own"),
    ([("[loss=at, train.max_steps=315]", "[loss=at, loss.telepathy=1]")], "mend at_long, which cannot be trained"),
    ([("[loss=at, train.max_steps=315]", "[loss=at, data.name=npz, data.root=x.npz]")], "data.train_size"),
])
def test_a_control_that_is_none_is_refused(changes: list[tuple[str, str]], message: str, tmp_path: Path) -> None:
    assert message in "\n".join(problems(plan(tmp_path, LONGER, *changes)))


def test_rows_of_data_that_must_be_read_are_compared_by_their_epochs(tmp_path: Path) -> None:
    """No row says how many images there are: 9 epochs of one peer cost as much as 4 of mat with two."""
    words = plan(tmp_path, ("train.max_steps=100, train.epochs=100", "train.epochs=4"),
                 ("train.max_steps=225", "train.epochs=9"), ("            control: at_long\n", ""))
    found = entries([*words, "data.name=npz", "data.root=absent.npz"])
    assert relative_cost(found["mat"], found["at_long"]) == 1 and found["mat"].cost is None
    cut = entries([*plan(tmp_path, ("            control: at_long\n", "")), "data.name=npz", "data.root=absent.npz"])
    assert relative_cost(cut["mat"], cut["at_long"]) == 1  # 100 steps of 36 passes, 225 of 16: max_steps count


def test_a_dry_run_shows_what_rows_cost_against_their_controls(tmp_path: Path, capsys: Any,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = plan(tmp_path, LONGER)
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "0.71 of at_long" in shown and "0.99 of at_long" in shown  # 36 and 50 of 50.4
    assert main([*words, "--dry-run", "attack.steps=1"]) == 2  # 12 passes of mat against 4 times 3.15
    assert "taught" in capsys.readouterr().err


def test_a_dry_run_counts_every_attack_threat_and_start_of_the_tests(tmp_path: Path) -> None:
    """Both attacks in linf once and in l1 from five starts, for two checkpoints of both peers; steps by default 20."""
    pgd = "[attacks=pgd, steps=2, images=30, checks=0, transfer=false, eval.chunk=30]}"
    both = '["attacks=apgd,cw", "threats=linf:0.1,l1:2", images=30], who: peers, checkpoints: [best, last]}'
    suite, made = planned(read_options(plan(tmp_path, ("max_steps=225", "max_steps=400"), (pgd, both),
                                            ("primary: pgd", "primary: union"))))
    found = {entry.name: evidence.tests(suite.tables["main"], entry, 0) for entry in made}
    assert found["at"] == 2 * 2 * (1 + 5) * 20 * 30 * 2 and found["mat"] == 2 * found["at"]


def test_every_row_is_compared_with_its_own_control_whatever_that_costs(tmp_path: Path) -> None:
    """With 400 steps at_long costs 1.78 times as much as mat: left out as one of the table's, not as its own."""
    words = plan(tmp_path, ("max_steps=225", "max_steps=400"), ("controls: [at_x2]", "controls: [at_x2, at]"))
    suite, made = planned(read_options(words))
    cells = {"at": 0.4, "at_x2": 0.5, "at_long": 0.6, "mat": 0.7, "taught": 0.5}
    for entry in made:
        entry.cells = lambda value=cells[entry.name]: {  # type: ignore[method-assign,misc]
            ("last", "mean", "pgd"): {seed: dict.fromkeys(range(100), value) for seed in (0, 1)}}
    document = table_document(suite.tables["main"], made)
    found = {(one["row"], one["control"]): one for one in document["comparisons"]["made"]}
    assert {pair for pair, one in found.items() if one["equal"]} == {("mat", "at_long"), ("taught", "at_long")}
    assert set(found) - {("mat", "at_long"), ("taught", "at_long")} == {("mat", "at_x2"), ("mat", "at")}
    assert found["mat", "at_long"]["cost_ratio"] == pytest.approx(36 / 64)
    assert next(row for row in document["rows"] if row["row"] == "taught")["starts_from"] == ["at_x2"]
    lines = verdict_lines(document["comparisons"])
    assert lines[0].startswith("Each row against its own control, which costs as much or more: `pgd`")
    assert lines[4] == "| `mat` | `at_long` | mean peer | 0.56 | +10.00 | +8.06 to +11.94 | 2 | beats |"
    assert json.dumps(document)


def test_a_control_that_is_not_measured_yet_is_told_first() -> None:
    rows = [{"row": "mat", "cost": 1.0, "mutual": True, "tried": 1, "control": "at"},
            {"row": "at", "cost": 1.0, "mutual": False, "tried": 1, "control": None}]
    lines = verdict_lines(comparisons(rows, [], "pgd"))
    assert "| `mat` | `at` | - | - | - | - | 0 | not measured yet |" in lines


def test_the_generalist_of_the_gpu_suite_has_the_peers_of_its_configuration(tmp_path: Path) -> None:
    """But for the schedule and averages of the suite."""
    words = ["evidence", "--suite", "gpu_union", "--root", str(tmp_path), "data.root=absent.npz"]
    row = entries(words)["mat_union"].first
    assert row is not None
    ours, theirs = ([peer.model_dump(exclude={"optim"}) for peer in config.peers]
                    for config in (row.config, load_config("union_generalist")))
    assert ours == theirs
