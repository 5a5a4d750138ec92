"""The accuracies that docs/evidence.md, the page of the first results and README.md quote are those of the results."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from tests.documents import ROOT, heads, table

PAGE, SEARCHED, WHOLE = "docs/evidence.md", "docs/search.md", "benchmarks/results/first/README.md"
RESULTS = ROOT / "benchmarks/results"
FIRST = RESULTS / "first"


@cache
def document(suite: str, title: str) -> dict[str, Any]:
    """A table of the committed results."""
    file = RESULTS / f"{suite}.json"
    file = file if file.is_file() else FIRST / file.name
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["tables"][title]
    return found


def results(suite: str, title: str) -> dict[str, Any]:
    """Rows of a table by name, and its primary column."""
    found = document(suite, title)
    return {"primary": found["primary"], "rows": {row["row"]: row for row in found["rows"]}}


def plain(name: str) -> str:
    """A row's name as the pages have it: without its table's prefix, as if all cohorts had three peers."""
    return name.removeprefix("long_").removeprefix("over_").replace("_x2", "_x3")


def words(page: str) -> str:
    """A page's text on one line."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


def percent(row: dict[str, Any], kind: str, column: str) -> str:
    return f"{100 * row['accuracy']['last'][kind][column]['mean']:.1f}"


def seeds(row: dict[str, Any], column: str) -> int:
    return max(len(found[column]["by_seed"]) for found in row["accuracy"]["last"].values() if column in found)


def in_points(one: dict[str, Any]) -> str:
    """A difference with its interval, as the pages write it."""
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*(100 * one[key] for key in ("mean", "low", "high")))


def difference(suite: str, title: str, checkpoint: str = "last", kind: str = "mean") -> str:
    """mat minus at_x3 in points, with its interval."""
    found = document(suite, title)
    (one,) = [one for one in found["differences"] if (one["kind"], one["checkpoint"], one["column"]) == (
        kind, checkpoint, found["primary"]) and (plain(one["row"]), plain(one["control"])) == ("mat", "at_x3")]
    return in_points(one)


def measured(suite: str, title: str) -> list[str]:
    """at_x3, mat and their difference as a page quotes them."""
    found = results(suite, title)
    by_name = {plain(name): row for name, row in found["rows"].items()}
    return [*(percent(by_name[name], "mean", found["primary"]) for name in ("at_x3", "mat")), difference(suite, title)]


def test_the_answer_quotes_accuracies_and_differences_as_measured() -> None:
    rows = table(PAGE, "## The first tables")
    assert len(rows) == 5
    for first, attack, count, *cells in rows:
        suite, title = re.findall(r"`(\w+)`", first)
        found = results(suite, title)
        assert cells == [*measured(suite, title), difference(suite, title, "best")], first
        assert attack.replace("-", "").lower() == found["primary"]
        assert {seeds(row, found["primary"]) for name, row in found["rows"].items()
                if plain(name) in ("at_x3", "mat")} == {int(count)}


def apart(title: str, row: str, control: str, column: str, checkpoint: str) -> str:
    """A difference in points of a suite with one table of its name, with its interval: of the mean peer or the best."""
    found = {one["kind"]: one for one in document(title, title)["differences"] if (
        one["row"], one["control"], one["column"], one["checkpoint"]) == (row, control, column, checkpoint)}
    one = found.get("mean", found.get("best"))
    assert one is not None
    return in_points(one)


def share(row: dict[str, Any], label: str, column: str, most: int = 3) -> str:
    """The accuracy of the mean peer, or of the best one, as the page quotes it: with the number of seeds where they are
    fewer than `most`."""
    accuracy = row["accuracy"].get(label, {})
    found = accuracy.get("mean", accuracy.get("best", {})).get(column)
    if found is None:
        return "-"
    fewer = len(found["by_seed"]) < most
    return f"{100 * found['mean']:.1f}" + (f" ({len(found['by_seed'])})" if fewer else "")


def assert_quoted(title: str, heading: str, columns: Sequence[tuple[str, str]], minus: str = "",
                  compared: Sequence[tuple[str, str]] = ()) -> None:
    """Every row of a table below a heading of the page: cost against its first row, `columns` (checkpoint, column), and
    what the row `minus` has more in the columns `compared`."""
    found, quoted = results(title, title)["rows"], table(PAGE, heading)
    assert {cells[0].strip("`") for cells in quoted} == set(found)
    first = found[quoted[0][0].strip("`")]
    most = seeds(first, columns[0][1])
    for name, _, cost, *cells in quoted:
        row = found[name.strip("`")]
        assert cells[:len(columns)] == [share(row, *one, most=most) for one in columns], name
        assert cost == f"{row['cost'] / first['cost']:.2f}"
        for cell, (label, column) in zip(cells[len(columns):], compared, strict=True):
            assert cell == "-" or cell == apart(title, minus, row["row"], column, label), name


ONE_NORM = [("last", "pgd100"), ("last", "aa"), ("best", "pgd20")]


def test_the_summary_is_quoted_as_measured() -> None:
    suites = {"pgd100": ("overfit", "cifar10"), "union": ("union",), "pgd50": ("onestep",)}
    rows = table(PAGE, "## The answer so far")
    assert len(rows) == 10
    for what, count, alone, taught, last, clean, best, control in rows:
        pair = re.findall(r"`(\w+)`", what)
        (suite, column), = [(suite, column) for column, names in suites.items() for suite in names
                            if set(pair) <= set(results(suite, suite)["rows"])]
        found, (long,) = results(suite, suite)["rows"], re.findall(r"`(\w+)`", control)
        most = seeds(found[pair[1]], column)
        assert [alone, taught] == [share(found[name], "last", column, most) for name in pair] and int(count) == most
        assert last == apart(suite, pair[1], pair[0], column, "last")
        assert best == apart(suite, pair[1], pair[0], "pgd20" if column == "pgd100" else column, "best")
        assert control == f"`{long}` {share(found[long], 'last', column, most)}"
        assert clean == apart(suite, pair[1], pair[0], "clean", "last")
        loses = bool(re.search(r"\(-.* to -", clean))
        assert loses == ("`mat_late`" in what or "`mat_max_wa`" in what), "as the answer says"
        assert not re.search(r"\(\+", clean)
        assert found[long]["cost"] > 0.95 * found[pair[1]]["cost"], "a control costs as much"


def test_the_best_epoch_is_told_as_measured() -> None:
    column = [float(row[6].split(" ")[0]) for row in table(PAGE, "## The answer so far")]
    overfit, union = (results(title, title)["rows"] for title in ("overfit", "union"))
    assert (f"peers gain at most {max(column):.2f} points there, and lose {-min(column):.2f} with three norms. One "
            "network of equal cost is ahead there where both have weight decay: `at_decay_long` {} %, `mat_decay` {}; "
            "`ramp_decay_long` {}, `mat_ramp_decay` {}.").format(
        *(share(overfit[name], "best", "pgd20") for name in ("at_decay_long", "mat_decay")),
        *(share(union[name], "best", "union") for name in ("ramp_decay_long", "mat_ramp_decay"))) in words(PAGE)


def test_the_tables_of_one_norm_are_quoted_as_measured() -> None:
    for title, heading, minus in (("overfit", "## Where networks overfit", "mat_wa"),
                                  ("cifar10", "## Where networks overfit: CIFAR-10", "mat_late")):
        assert_quoted(title, heading, ONE_NORM, minus, [ONE_NORM[0], ONE_NORM[2]])
    assert_quoted("onestep", "## One-step training", [("last", "pgd50"), ("best", "pgd50")])
    assert_quoted("union", "## Three norms at once", [("last", "union"), ("best", "union")], "mat_max_wa",
                  [("last", "union")])


def points(title: str, row: str, control: str, column: str, checkpoint: str = "last") -> str:
    """Size of a difference, without its sign."""
    return apart(title, row, control, column, checkpoint).split(" ")[0].lstrip("+-")


def test_the_answer_is_what_was_measured() -> None:
    text = words(PAGE)
    assert "a [preset](loss.md#presets)): {} points above bare independent peers and {} above those".format(
        *(points("cifar10", "mat_late", row, "pgd100") for row in ("at_x2", "at_wa_x2"))) in text
    one, three = (apart(title, mutual, alone, column, "last") for title, mutual, alone, column in (
        ("overfit", "mat_decay", "at_decay_x3", "pgd100"), ("union", "mat_ramp_decay", "ramp_decay", "union")))
    assert "end {} points apart with one norm, and {} with three, both within noise".format(
        *(both.split(" ")[0] for both in (one, three))) in text
    assert all(re.search(r"\(-.* to \+", both) for both in (one, three))
    assert f"with one norm ({one.replace('(', '').replace(' -', ', -').rstrip(')')}) or three" in words("README.md")
    aa = results("cifar10", "cifar10")["rows"]
    assert "({} against {} on CIFAR-10)".format(*(share(aa[name], "last", "aa") for name in ("at_wa_x2", "mat_late"))
                                                ) in words("README.md")
    cifar10, overfit = (results(title, title)["rows"] for title in ("cifar10", "overfit"))
    assert "three seeds: `at_wa_x2` {} %, `mat_late` {} %, {}; seed 2 alone: `at_x2` {} %, `mat_wa` {} %.".format(
        *(share(cifar10[name], "last", "aa") for name in ("at_wa_x2", "mat_late")),
        apart("cifar10", "mat_late", "at_wa_x2", "aa", "last"),
        *(share(cifar10[name], "last", "aa", most=1) for name in ("at_x2", "mat_wa"))) in text
    assert "seed 2 alone: `at_wa_x3` {} %, `mat_wa` {} %; `at_decay_x3` {} %, `mat_decay` {} %, {}.".format(
        *(share(overfit[name], "last", "aa", most=1) for name in ("at_wa_x3", "mat_wa", "at_decay_x3", "mat_decay")),
        apart("overfit", "mat_decay", "at_decay_x3", "aa", "last")) in text
    assert ("(`mat_max_wa`) end {} points above the best single norm, where the paper claims 13.1, and {} above RAMP"
            ).format(
        *(points("union", "mat_max_wa", row, "union") for row in ("at_l2", "ramp"))) in text
    assert "(`mat_union_wa`) ends {} above the best single norm and {} below `max_wa`".format(
        *(points("union", "mat_union_wa", row, "union") for row in ("at_l2", "max_wa"))) in text
    onestep = results("onestep", "onestep")["rows"]
    steps = [share(onestep[name], "last", "pgd50", 1) for name in (
        "fgsm_mat", "fgsm_x2", "nfgsm_mat", "nfgsm_x2", "pgd3_x2")]
    assert ("with them FGSM ends at {} % in place of {}, N-FGSM at {} in place of {}; PGD with 3 steps, alone and for "
            "a third more, at {}.").format(*steps) in text
    assert "PGD with 7 steps from {} to {} as well".format(
        *(share(onestep["pgd7_x2"], label, "pgd50", 1) for label in ("best", "last"))) in text
    assert "`mat_decay` minus `at_decay_x3` {}, which is noise, minus `at_decay_long` {}.".format(
        *(apart("overfit", "mat_decay", row, "pgd100", "last") for row in ("at_decay_x3", "at_decay_long"))) in text


def tried(*settings: str, suite: str = "overfit") -> dict[str, Any]:
    """The mean peer's scores of a setting of the search, by all that it sets."""
    found = json.loads((RESULTS / f"search_{suite}.json").read_text(encoding="utf-8"))
    (one,) = [one for one in found["settings_tried"] if {
        *found["families"][one["family"]]["settings"], *one["point"]} == set(settings)]
    scores: dict[str, Any] = one["scores"]["mean"]
    return scores


def test_the_best_settings_of_the_search_are_quoted_as_measured() -> None:
    found = json.loads((RESULTS / "search_overfit.json").read_text(encoding="utf-8"))
    whole = [one for one in found["settings_tried"] if one["state"] == "done"]
    text = words(SEARCHED)
    assert f"{found['runs']['done']} of {found['runs']['all']} runs" in text
    sides = {side: [one for one in found["settings_tried"] if one["family"].startswith("at") == alone]
             for side, alone in (("independent", True), ("mutual", False))}
    assert "{} settings of independent peers and {} of mutual ones".format(*map(len, sides.values())) in text
    for side, _, accuracy in table(SEARCHED, "## One norm"):
        best = max(one["scores"]["mean"]["mean"] for one in whole if one in sides[side])
        assert accuracy == f"{100 * best:.1f}"


def test_the_search_for_three_norms_is_quoted_as_measured() -> None:
    found = json.loads((RESULTS / "search_union.json").read_text(encoding="utf-8"))
    sides = {"one network": ("max", "max_more"), "generalists that teach each other": ("mat_max", "mat_ramp"),
             "a generalist that specialists teach": ("mat_union",)}
    counts = {side: [one for one in found["settings_tried"] if one["family"] in names] for side, names in sides.items()}
    alone, *mutual = map(len, counts.values())
    text = words(SEARCHED)
    assert f"{alone} settings of one network and {sum(mutual)} of mutual ones, in two rounds, one seed" in text
    for side, _, accuracy in table(SEARCHED, "## Three norms"):
        assert accuracy == f"{100 * max(one['scores']['mean']['mean'] for one in counts[side]):.1f}"
    common = ("peers=1", "loss=at", "union.threats=linf:0.1,l2:1,l1:8", "loss.label_smoothing=0.4",
              "optim.ema_decay=0.983")
    steps = [tried(*common, "union.strategy=max", *more, suite="union") for more in (
        (), ("optim.weight_decay=0.02",), ("optim.weight_decay=0.02", "union.strategy=ramp"))]
    assert "have {} % with `max`, {} % with 40 times the weight decay, {} % with RAMP's loss".format(
        *(f"{100 * one['mean']:.1f}" for one in steps)) in text
    same = tried(*common, "union.strategy=ramp", "optim.weight_decay=0.01", "optim.clip_norm=1", "optim.lr=0.3",
                 suite="union")["mean"]
    best = max(one["scores"]["mean"]["mean"] for one in counts["generalists that teach each other"])
    assert f"one network alone has {100 * same:.1f} %, {100 * (best - same):.1f} points less" in text


def on_cifar10() -> dict[str, list[dict[str, Any]]]:
    """The settings of one network and of peers by weight decay and rate, of the search on CIFAR-10."""
    document = json.loads((RESULTS / "search_cifar10.json").read_text(encoding="utf-8"))
    sides = ({"peers=1", "loss=at"}, {"loss=mat", "loss.kd_weight=0.9", "loss.warmup_epochs=8"})
    found: dict[str, list[dict[str, Any]]] = {}
    for side in sides:
        for one in document["settings_tried"]:
            own = {*document["families"][one["family"]]["settings"], *one["point"]}
            if side <= own:
                given = dict(word.split("=") for word in own)
                decay, rate = given.get("optim.weight_decay", "0.0005"), given.get("optim.lr", "0.1")
                found.setdefault(f"{decay} {rate}", []).append(one)
    return found


def test_the_search_on_cifar10_is_quoted_as_measured() -> None:
    def quoted(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    def lost(one: dict[str, Any]) -> str:
        shares = [f"{100 * value:.0f}" for value in units.get(f"{one['name']}_100", {"unused": {}})["unused"].values()]
        return " to ".join(sorted(set(shares), key=float)) or "-"

    units = json.loads((RESULTS / "units_search_cifar10.json").read_text(encoding="utf-8"))["runs"]
    measured, best, gains = on_cifar10(), [0.0, 0.0], []
    rows = table(SEARCHED, "## CIFAR-10")
    assert len(rows) == len(measured) == 7
    for decay, rate, *cells in rows:
        pair = measured[f"{re.split('[ ,]', decay)[0]} {rate}"]
        alone, taught = (100 * one["scores"]["mean"]["mean"] if one["scores"] else None for one in pair)
        gain = None if alone is None or taught is None else taught - alone
        shown = quoted(alone, "{:.1f}"), quoted(taught, "{:.1f}"), quoted(gain, "{:+.1f}")
        assert cells == [*shown, *map(lost, pair)], decay
        best = [max(best[0], alone or 0.0), max(best[1], taught or 0.0)]
        gains += [] if gain is None else [gain]
    (alone, taught), text = best, words(SEARCHED)
    first, late = (100 * one["scores"]["mean"]["mean"] for one in measured["0.0005 0.1"])
    assert (f"from {first:.1f} to {alone:.1f} % and peers from {late:.1f} to {taught:.1f}. Between the best settings "
            f"of either side {taught - alone:.1f} points are left") in text
    assert f"peers gain {min(gains):.1f} to {max(gains):.1f} points" in text
    assert (f"{alone:.1f} % of the validation images alone and {taught:.1f} % taught, where the settings of `at_wa_x2` "
            f"and `mat_late` have {first:.1f} and {late:.1f}.") in words(PAGE)


def test_what_peers_gain_at_each_weight_decay_is_quoted_as_measured() -> None:
    common = ("loss.label_smoothing=0.4", "optim.ema_decay=0.983", "optim.clip_norm=1", "optim.lr=0.3")
    late = ("loss=mat", "loss.kd_weight=0.9", "loss.warmup_epochs=20")
    for decay, alone, mutual, between, count in table(SEARCHED, "## Peers or weight decay"):
        own = () if decay == "0.0005" else (f"optim.weight_decay={decay}",)
        control, taught = tried("loss=at", *common, *own), tried(*late, *common, *own)
        assert [alone, mutual] == [f"{100 * one['mean']:.1f}" for one in (control, taught)]
        both = [taught["by_seed"][seed] - value for seed, value in control["by_seed"].items()
                if seed in taught["by_seed"]]
        assert (between, int(count)) == (f"{100 * sum(both) / len(both):+.1f}", len(both))


def test_units_that_are_lost_are_quoted_as_counted() -> None:
    counts = [json.loads((RESULTS / name).read_text(encoding="utf-8"))["runs"] for name in (
        "units.json", "units_ramp.json", "units_cifar10.json")]
    runs, colours = {**counts[0], **counts[1]}, counts[2]
    text = words(SEARCHED).split("## Units that are lost")[1].split("## ")[0]
    quoted = re.findall(r"`(\w+)` (?:has )?(\d+) to (\d+) %", text)
    assert len(quoted) == 12
    for name, low, high in quoted:
        found = [value for run, one in runs.items() if run.rpartition("_")[0] == name
                 for value in one["unused"].values()]
        assert len(found) >= 3 and (low, high) == (f"{100 * min(found):.0f}", f"{100 * max(found):.0f}"), name
    assert {run.rpartition("_")[0] for run in colours} == {"at_x2", "at_wa_x2", "mat_wa", "mat_late"}
    most = max(value for one in colours.values() for value in one["unused"].values())
    assert f"`mat_late` has more than {100 * most:.0f} %" in text
    row = results("overfit", "overfit")["rows"]["at_searched_x3"]
    peers = [one for found in row["accuracy"]["last"]["mean"]["pgd100"]["by_peer"].values() for one in found.values()]
    lost = sum(one < 0.15 for one in peers)  # 10 classes
    assert (len(peers), lost) == (9, 3) and "nine networks three do not learn" in text
    assert f"the best one of three ends at {percent(row, 'best', 'pgd100')} %" in text


def test_the_answer_shows_the_figure_of_every_table_that_was_measured() -> None:
    for page, folder in ((PAGE, RESULTS), (WHOLE, FIRST)):
        text = (ROOT / page).read_text(encoding="utf-8")
        shown = [(ROOT / page).parent / name for name in re.findall(r'<img src="([^"]+)"', text)]
        assert sorted(file.resolve() for file in shown) == sorted(folder.glob("*_figures/*.svg"))


def test_mean_peer_and_ensemble_of_every_table_are_quoted_as_measured() -> None:
    heading = "## Mutual against independent peers"
    names = [re.findall(r"`(\w+)`", head) for head in heads(WHOLE, heading)]
    for first, count, *cells in table(WHOLE, heading):
        suite, title = re.findall(r"`(\w+)`", first)[:2]
        found = results(suite, title)
        for (name,), cell in zip(names[2:], cells, strict=True):
            known = [row for key, row in found["rows"].items() if plain(key) == name]
            if cell == "-":
                assert not known or not known[0]["accuracy"], (first, name)
                continue
            (row,) = known
            shown = ", ".join(percent(row, kind, found["primary"]) for kind in ("mean", "ensemble"))
            fewer = seeds(row, found["primary"])
            assert cell == shown + (f" ({fewer})" if fewer < int(count) else ""), (first, name)


def test_the_union_is_quoted_as_measured() -> None:
    heading = "## Three norms"
    columns = [head.partition(" ")[0] for head in heads(WHOLE, heading)][2:]
    found = results("cpu", "union")["rows"]
    rows = table(WHOLE, heading)
    assert len(rows) == len(found)
    shares = {}
    for name, count, *cells in rows:
        row = found[name.strip("`")]
        kind = "best" if "mean" not in row["accuracy"]["last"] else "mean"
        assert cells == [percent(row, kind, column) for column in columns], name
        assert str(seeds(row, "union")) == count, name
        shares[row["row"]] = f"{100 * row['accuracy']['last'][kind]['union']['mean']:.0f}"
    text = words(WHOLE)
    assert (f"alone withstand {shares['generalist']} to {shares['generalist_max']} %; with AEs of their own "
            f"{shares['generalist_msd']} %, below `max` and `ramp` at {shares['max']} %") in text
    assert shares["max"] == shares["ramp"]


# The rows of README.md in their order: suite and table of the committed results, the rows and the column.
PLAIN, AVERAGED = ("at_x3", "mat"), ("at_wa_x3", "mat_wa")
QUOTED = (("overfit", "overfit", PLAIN, ""), ("overfit", "overfit", AVERAGED, ""),
          ("overfit", "overfit", ("at_decay_x3", "mat_decay"), ""),
          ("union", "union", ("max_wa", "mat_max_wa"), ""), ("union", "union", ("ramp_decay", "mat_ramp_decay"), ""),
          ("cifar10", "cifar10", PLAIN, ""), ("cifar10", "cifar10", AVERAGED, ""),
          ("cifar10", "cifar10", ("at_wa_x3", "mat_late"), ""),
          ("cpu", "overfit", PLAIN, ""), ("cpu", "linf", PLAIN, ""),
          ("cpu_cifar10", "linf", PLAIN, ""), ("gpu", "linf", PLAIN, ""))


def test_the_readme_quotes_accuracies_and_differences_as_measured() -> None:
    rows = table("README.md", "## What it is worth")
    assert len(rows) == len(QUOTED)
    for (suite, title, (control, mutual), asked), (_, attack, count, *cells) in zip(QUOTED, rows, strict=True):
        found = document(suite, title)
        column, by_name = asked or found["primary"], {plain(row["row"]): row for row in found["rows"]}
        (one,) = [one for one in found["differences"] if (
            plain(one["row"]), plain(one["control"]), one["kind"], one["checkpoint"], one["column"]) == (
            mutual, control, "mean", "last", column)]
        assert cells == [*(percent(by_name[name], "mean", column) for name in (control, mutual)), in_points(one)]
        assert seeds(by_name[mutual], column) == int(count) and attack.replace("-", "").lower() == column
