"""What a study says about mutual training, sentences and reasons, against numbers by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mat_dist.bench.study.verdicts import comparisons, is_mutual, verdict_lines
from mat_dist.config import load_config

# ------------------------------------------------------------------------------------------------ sentences


def row(name: str, cost: float | None, mutual: bool = False) -> dict[str, Any]:
    return {"row": name, "cost": cost, "mutual": mutual}


def difference(name: str, control: str, mean: float, verdict: str, **more: Any) -> dict[str, Any]:
    return {"row": name, "control": control, "checkpoint": "last", "kind": "mean", "column": "pgd", "mean": mean,
            "low": mean - 0.01, "high": mean + 0.01, "by_seed": [mean, mean], "images": 100, "verdict": verdict, **more}


ROWS = [row("at", 10.0), row("at_x3", 30.0), row("costly", 60.0), row("mat", 40.0, True), row("unread", None)]
DIFFERENCES = [
    difference("mat", "at_x3", 0.012, "above"), difference("mat", "at", -0.02, "below (one seed)", by_seed=[-0.02]),
    difference("mat", "at_x3", 0.001, "noise", kind="ensemble"),
    difference("mat", "costly", 0.3, "above"), difference("mat", "unread", 0.3, "above"),  # more, and nobody knows what
    difference("at", "at_x3", -0.3, "below"),  # not mutual
    difference("mat", "at", 0.3, "above", checkpoint="best"), difference("mat", "at", 0.3, "above", column="clean"),
]


def test_mutual_rows_meet_every_control_of_equal_or_lower_cost() -> None:
    """Costs 40 against 30, 10, 60: the last one is left out, and so is the one whose cost nobody knows."""
    found = comparisons(ROWS, DIFFERENCES, "pgd")
    assert [(one["control"], one["kind"], one["verdict"]) for one in found["made"]] == [
        ("at", "mean", "loses"), ("at_x3", "mean", "beats"), ("at_x3", "ensemble", "noise")]
    assert [one["cost_ratio"] for one in found["made"]] == pytest.approx([4, 4 / 3, 4 / 3])
    assert found["left_out"] == [["mat", "costly"], ["mat", "unread"]]
    assert found["by_chance"] == pytest.approx(0.15)  # 3 at 5 %


def test_a_control_that_costs_hardly_more_is_one_of_equal_cost() -> None:
    rows = [row("at", 104.0), row("mat", 100.0, True)]
    assert len(comparisons(rows, [difference("mat", "at", 0.1, "above")], "pgd")["made"]) == 1
    rows = [row("at", 106.0), row("mat", 100.0, True)]
    assert comparisons(rows, [difference("mat", "at", 0.1, "above")], "pgd")["made"] == []


def test_every_pair_has_one_sentence_with_points_interval_and_cost() -> None:
    lines = verdict_lines(comparisons(ROWS, DIFFERENCES, "pgd"))
    assert "3 comparisons were made" in lines[0] and "about 0.2 of them" in lines[0]
    assert ("  - against `at`, at 4.00 times its cost, 1 seed: mean peer **loses** -2.00 points (-3.00 to -1.00)."
            ) in lines
    assert ("  - against `at_x3`, at 1.33 times its cost, 2 seeds: mean peer **beats** +1.20 points (+0.20 to +2.20); "
            "ensemble noise +0.10 points (-0.90 to +1.10).") in lines
    assert ("- **`mat`**: the mean peer beats 1 of 2 controls, loses to 1, noise 0; the ensemble beats 0 of 1 "
            "controls, loses to 0, noise 1.") in lines
    assert "`mat` against `costly`, `mat` against `unread`" in "\n".join(lines)
    assert "yet" in verdict_lines(comparisons(ROWS, [], "pgd"))[0]


@pytest.mark.parametrize(("settings", "mutual"), [
    (["peers=3", "loss=at"], False), (["peers=3", "loss=mat"], True), (["peers=2", "loss=mat_share"], True),
    (["peers=2", "loss=lbgat"], True), (["peers=1", "loss=trades"], False),
    (["peers=2", "loss=ard", "peers.1.frozen=true", "peers.1.init_from=RUN"], False),  # its teacher does not train
    (["peers=3", "peers.0.role=specialist", "peers.1.role=specialist", "peers.1.threat=l2", "peers.2.role=generalist"],
     True),
])
def test_peers_that_learn_from_each_other_make_a_row_mutual(settings: list[str], mutual: bool, tmp_path: Path) -> None:
    assert is_mutual(load_config("digits", [word.replace("RUN", str(tmp_path)) for word in settings])) is mutual
