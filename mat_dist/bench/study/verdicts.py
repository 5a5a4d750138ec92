"""What the differences of a table say about mutual training: one sentence per row and control, from the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mat_dist.config.schema import Config
from mat_dist.core.graph import CohortPlan

EQUAL_COST = 1.05  # a control may cost so many times a row's passes and still count as one of equal cost
CHANCE = 0.05  # of a 95 % interval without 0 where there is no difference
WORDS = {"above": "beats", "below": "loses", "noise": "noise"}
KINDS = {"mean": "mean peer", "best": "best peer", "ensemble": "ensemble"}


def is_mutual(config: Config) -> bool:
    """Whether some peer learns from another one that trains in the same run: its AEs, its opinion, its weights."""
    cohort = CohortPlan.of(config.peers)
    if cohort.split or config.step.pull:
        return True
    for plan in cohort.peers:
        sources = {slot for slot in plan.learned if slot < plan.peers}
        sources |= {teacher for slot in plan.distilled for teacher in plan.teachers(slot)}
        sources |= set(cohort.guided[plan.index])
        if not plan.me.frozen and any(i != plan.index and not config.peers[i].frozen for i in sources):
            return True
    return False


def comparisons(rows: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]], primary: str
                ) -> dict[str, Any]:
    """Every mutual row against every control that costs as much as it or less, by the primary column, last checkpoint.

    Args:
        rows, differences: of the table's JSON document.

    Returns:
        `made`: the comparisons, with `verdict` beats, loses or noise and `cost_ratio`, the row's cost by the control's;
        `left_out`: (row, control) whose control costs more, or whose cost is not known; `several`: how many of those
        made have more than one seed; `by_chance`: how many of all would not be called noise were there no difference
        and every interval right.
    """
    known = {row["row"]: row for row in rows}
    made: list[dict[str, Any]] = []
    left_out: dict[tuple[str, str], None] = {}
    for one in differences:
        row, control = known[one["row"]], known[one["control"]]
        if not row["mutual"] or one["checkpoint"] != "last" or one["column"] != primary:
            continue
        ratio = row["cost"] / control["cost"] if row["cost"] and control["cost"] else None
        if ratio is None or ratio * EQUAL_COST < 1:
            left_out[row["row"], control["row"]] = None
            continue
        word = WORDS[one["verdict"].partition(" ")[0]]
        made.append({"row": row["row"], "control": control["row"], "kind": one["kind"], "verdict": word,
                     "mean": one["mean"], "low": one["low"], "high": one["high"], "seeds": len(one["by_seed"]),
                     "images": one["images"], "cost_ratio": ratio, "tried": [row["tried"], control["tried"]]})
    order = [row["row"] for row in rows]
    made.sort(key=lambda one: (order.index(one["row"]), order.index(one["control"]), list(KINDS).index(one["kind"])))
    several = sum(one["seeds"] > 1 for one in made)
    return {"column": primary, "made": made, "left_out": [list(pair) for pair in left_out], "several": several,
            "by_chance": CHANCE * len(made)}


def verdict_lines(found: Mapping[str, Any]) -> list[str]:
    """The comparisons as Markdown: how many, what came out for each row, a sentence for each pair."""
    made: Sequence[Mapping[str, Any]] = found["made"]
    if not made:
        return ["No row in which peers learn from each other meets a control of equal or lower cost yet."]
    lines = [f"Rows in which peers learn from each other, against every control that costs as much or less: "
             f"`{found['column']}` of the last checkpoint, difference in points with its 95 % interval. "
             f"{len(made)} comparisons were made, {found['several']} of them over several seeds; were there no "
             f"difference anywhere, about {found['by_chance']:.1f} of all would still not be called noise (5 %); fewer "
             "where the wider of two intervals counts, more where there is one seed, whose interval knows nothing of "
             "what another seed would give and is too narrow. Noise means that the difference cannot be told, not that "
             "there is none: see the intervals. The comparisons share rows, seeds, images: they do not err one by one. "
             "Cost is that of training; an ensemble also costs as many predictions as it has members.", ""]
    if found["left_out"]:
        lines += [f"Left out, since the control costs more or its cost is not known: "
                  f"{', '.join(f'`{row}` against `{control}`' for row, control in found['left_out'])}.", ""]
    for row in dict.fromkeys(one["row"] for one in made):
        mine = [one for one in made if one["row"] == row]
        lines.append(f"- **`{row}`**: {_summary(mine)}")
        for control in dict.fromkeys(one["control"] for one in mine):
            lines.append(f"  - {_sentence([one for one in mine if one['control'] == control])}")
    return lines


def _summary(mine: Sequence[Mapping[str, Any]]) -> str:
    """How often a row beats, loses and neither, by who is compared."""
    parts = []
    for kind, name in KINDS.items():
        words = [one["verdict"] for one in mine if one["kind"] == kind]
        if words:
            parts.append(f"the {name} beats {words.count('beats')} of {len(words)} controls, loses to "
                         f"{words.count('loses')}, noise {words.count('noise')}")
    return "; ".join(parts) + "."


def _sentence(pair: Sequence[Mapping[str, Any]]) -> str:
    """One row against one control."""
    first = pair[0]
    told = "; ".join(f"{KINDS[one['kind']]} {'' if one['verdict'] == 'noise' else '**'}{one['verdict']}"
                     f"{'' if one['verdict'] == 'noise' else '**'} {100 * one['mean']:+.2f} points "
                     f"({100 * one['low']:+.2f} to {100 * one['high']:+.2f})" for one in pair)
    seeds = min(one["seeds"] for one in pair)
    mine, theirs = first["tried"]
    tried = "" if mine == theirs else f", chosen from {mine} settings where the control is from {theirs}"
    return (f"against `{first['control']}`, at {first['cost_ratio']:.2f} times its cost, "
            f"{'one seed alone' if seeds == 1 else f'{seeds} seeds'}{tried}: {told}.")
