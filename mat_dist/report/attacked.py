"""Sections made from what the report measured itself: pictures, attack strength, transfer, loss around an image."""

from __future__ import annotations

from collections.abc import Sequence

from mat_dist.attacks.norms import Threat, eps_text
from mat_dist.evaluation.statistics import wilson_interval
from mat_dist.report.book import Book, charts
from mat_dist.report.charts import Series, line_chart, surface
from mat_dist.report.evaluations import ENSEMBLE
from mat_dist.report.html import Child, Markup, folded, section, table, tag
from mat_dist.report.measure import SURFACE_IMAGES, Measured, Picture
from mat_dist.report.pixels import data_uri, png, scaled
from mat_dist.report.results import percent
from mat_dist.report.subject import Subject
from mat_dist.report.training import MOST_PEERS, transfer_chart

MOST_ANSWERS = 12  # rows of predictions below a picture


def gallery_section(subject: Subject, measured: Measured, book: Book) -> Markup:
    """Clean image, perturbation, AE and what every target says, for some test images."""
    told = (f"AEs against {subject.source}, {subject.source_threat.label}, PGD-{subject.plan().steps}. Up to half of "
            "the images were chosen because their AE fools it, so this is no sample to count. Perturbations are "
            "scaled: grey is no change, white or black the largest one. Wrong answers are bold and red.")
    cards = [_card(subject, one, book) for one in measured.pictures]
    return section("gallery", "Gallery", tag("p", told), tag("div", *cards, class_="cards"))


def _class(subject: Subject, index: int) -> str:
    return subject.classes[index] if index < len(subject.classes) else f"class {index}"


def _card(subject: Subject, one: Picture, book: Book) -> Markup:
    label = _class(subject, one.label)
    images: list[Child] = []
    for kind, image in (("clean", one.clean), ("perturbation", scaled(one.adversarial - one.clean)),
                        ("adversarial", one.adversarial)):
        content = png(image)
        book.files[f"gallery_{one.sample}_{kind}.png"] = content
        picture = tag("img", src=data_uri(content), alt=f"{kind}, test image {one.sample}, class {label}")
        images.append(tag("figure", picture, tag("figcaption", kind)))

    def answer(index: int, probability: float) -> Markup:
        return tag("td", _class(subject, index), tag("small", f"{100 * probability:.0f} %"),
                   class_=None if index == one.label else "wrong")

    rows = [tag("tr", tag("th", name, scope="row"), answer(clean, sure), answer(attacked, surely))
            for name, clean, sure, attacked, surely in _shown(one)]
    head = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in ("prediction", "clean", "adversarial")]))
    return tag("article", tag("h3", f"{label} ", tag("span", f"test image {one.sample}", class_="dim")),
               tag("div", *images, class_="images"),
               tag("div", tag("table", head, tag("tbody", rows)), class_="scroll"), class_="card")


def _shown(one: Picture) -> Sequence[tuple[str, int, float, int, float]]:
    """The answers of the first peers, and of the ensemble, which comes last."""
    return one.answers if len(one.answers) <= MOST_ANSWERS else (*one.answers[:MOST_ANSWERS - 1], one.answers[-1])


def strength_section(subject: Subject, measured: Measured, book: Book) -> Markup:
    """Robust accuracy against the radius and against the number of steps."""
    n, figures, numbers = measured.n, list[Child](), list[Child]()
    for threat in subject.threats:
        by_eps, by_steps = measured.by_eps[threat.label], measured.by_steps[threat.label]
        figures.append(book.figure(f"eps_{threat.norm}_{_plain(threat)}", line_chart(
            f"Robust accuracy against the radius, {threat.norm}", _series(by_eps, n), x_label=f"eps ({threat.norm})",
            y_label="%", limits=(0, 1), percent=True, guide=(threat.eps, eps_text(threat.eps))),
            f"PGD-{subject.plan().steps}; it must fall, to near 0 for a large radius."))
        figures.append(book.figure(f"steps_{threat.norm}_{_plain(threat)}", line_chart(
            f"Robust accuracy against attack steps, {threat.label}", _series(by_steps, n), x_label="PGD steps",
            y_label="%", percent=True, log_x=True, x_marks=[x for x, _ in by_steps[ENSEMBLE]],
            guide=(subject.plan().steps, "as evaluated")),
            "Steps of 2.5 eps / steps; it should level off: more steps must not help much."))
        for points, what in ((by_eps, "eps"), (by_steps, "steps")):
            head = [f"{what}, {threat.norm}", *points]
            rows = [[f"{x:.4g}", *(percent(points[name][k][1], 1) for name in points)]
                    for k, (x, _) in enumerate(points[ENSEMBLE])]
            numbers.append(table(f"robust accuracy in %, n = {n}", head, rows))
    half = 100 * (wilson_interval(0.5, n)[1] - 0.5)
    told = (f"Only {n} test images and one start of the attack: each point is uncertain by up to ± {half:.0f} points "
            "(95\u00a0%; the band is the ensemble's). They are the same images everywhere, so the shape of a curve is "
            "surer than its height.")
    return section("strength", "Strength of the attack", tag("p", told), charts(*figures),
                   folded("The numbers", numbers))


def _plain(threat: Threat) -> str:
    """The radius as part of a file name."""
    return eps_text(threat.eps).replace("/", "_")


def _series(found: dict[str, list[tuple[float, float]]], n: int) -> list[Series]:
    series = []
    for index, (name, points) in enumerate(found.items()):
        band = [(x, *wilson_interval(share, n)) for x, share in points] if name == ENSEMBLE else []
        series.append(Series(name, points, -1 if name == ENSEMBLE else index, band))
    return series


def transfer_section(subject: Subject | None, measured: Measured | None, last: tuple[Markup, float] | None,
                     book: Book) -> Markup | None:
    """Who falls for whose AEs: on test images, and as the training noted it."""
    figures: list[Child] = []
    if subject is not None and measured is not None and len(subject.peers) <= MOST_PEERS:
        for threat in subject.threats:
            name = f"transfer_{threat.norm}_{_plain(threat)}"
            figures.append(book.figure(name, transfer_chart(
                f"Transfer on test images, %, {threat.label}", list(subject.peers), list(subject.targets),
                measured.transfer[threat.label]),
                f"PGD-{subject.plan().steps}, n = {measured.n}, evaluation mode. The diagonal is each peer's own AEs."))
    if last is not None:
        figures.append(book.figure("transfer_training", last[0],
                                   f"Epoch {last[1]:.4g}, a batch of the training, train mode: a diagnostic."))
    if not figures:
        return None
    told = "Accuracy of the model in each row on AEs that were crafted against the peer of the column."
    return section("transfer", "Transfer between peers", tag("p", told), charts(*figures))


def loss_section(subject: Subject, measured: Measured, book: Book) -> Markup:
    """The loss around clean images: a smooth bowl, or the cliffs of masked gradients."""
    n = min(SURFACE_IMAGES, measured.n)
    chart = surface(f"Loss of {subject.source} around {n} test images", measured.places, measured.surface,
                    x_label="along the AE's perturbation, in eps", y_label="along a random direction, in eps",
                    value_label="cross-entropy", description="Mean cross-entropy over two directions, clean images "
                                                             "in the middle, their AEs at the middle of the right edge")
    figures: list[Child] = [book.figure("loss_surface", chart, "Clean images in the middle, their AEs at 1 on the "
                                                               "horizontal axis.")]
    for key, title in (("adversarial", "Loss towards the AE"), ("random", "Loss along a random direction")):
        series = [Series(one.peer, list(zip(measured.places, getattr(one, key), strict=True)), index)
                  for index, one in enumerate(measured.slices)]
        figures.append(book.figure(f"loss_{key}", line_chart(
            title, series, x_label="distance from the clean image, in eps", y_label="cross-entropy",
            limits=_both_limits(measured)), "Each peer with its own AEs; both charts have one scale."))
    told = (f"Mean cross-entropy of {n} test images at x + a d + b r, cut to [0, 1]: d is the perturbation of PGD, r a "
            "random perturbation of length eps. A smooth loss that rises towards the AE much more than along r is what "
            "an attack can follow; ridges and cliffs point to masked gradients.")
    return section("loss-surface", "Loss around an image", tag("p", told), charts(*figures))


def _both_limits(measured: Measured) -> tuple[float, float]:
    values = [value for one in measured.slices for value in (*one.adversarial, *one.random)]
    low, high = min(values), max(values)
    return (0.0 if low >= 0 else low), high * 1.05 or 1.0
