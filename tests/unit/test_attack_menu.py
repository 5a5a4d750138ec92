"""The attacks by name, against slow implementations; noise; votes and their members; the tables of the documents."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.apgd import APGD_L1_SHARE
from mat_dist.attacks.norms import Threat
from mat_dist.attacks.pgd import likely_wrong, pgd
from mat_dist.attacks.random_search import noisy, patch_change
from mat_dist.config import load_config
from mat_dist.config.norms import UNIONS, data_sets, known_norms
from mat_dist.config.schema import Config
from mat_dist.errors import ConfigError
from mat_dist.evaluation import attacks
from mat_dist.evaluation.attacks import (
    TRANSFER,
    AttackPlan,
    Job,
    attack_one,
    attack_targets,
    crafted,
    made,
    predict,
    strongest,
)
from mat_dist.evaluation.autoattack import AutoAttacked, chunk_seed
from mat_dist.evaluation.settings import MENU, Request, parse, stand_in
from mat_dist.evaluation.soundness import examine
from mat_dist.evaluation.targets import attack_plans, make_targets, threats_asked
from tests.documents import table

LINF, L2 = Threat("linf", 0.1), Threat("l2", 0.4)
CLASSES = 5


def network(seed: int, scale: float = 1.0) -> nn.Module:
    """A small frozen network in fp64, so that rounding decides nothing."""
    with rng.keyed_rng(seed), torch.no_grad():
        layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, CLASSES)).double()
        layers[3].weight.mul_(8 * scale)
    return layers.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return rng.uniform(1, (24, 1, 4, 4), dtype=torch.float64)


def plan(name: str, *words: str) -> AttackPlan:
    """The plan of one attack on the command line."""
    request = parse(["runs/x", f"attacks={name}", *words]).request
    return attack_plans(request, Config())[name]


def clip(adv: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """One image back to the ball and the box."""
    d = adv - x
    d = d.clamp(-threat.eps, threat.eps) if threat.norm == "linf" else d * min(1.0, threat.eps / d.norm().item())
    return (x + d).clamp(0, 1)


def gradient(model: nn.Module, adv: Tensor, label: int) -> Tensor:
    adv = adv.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(F.cross_entropy(model(adv[None]), torch.tensor([label])), adv)
    return g


# ------------------------------------------------------------------------------------------------ gradient attacks


@pytest.mark.parametrize("threat", [LINF, L2], ids=lambda t: t.norm)
def test_mifgsm_follows_the_sum_of_normalised_gradients_image_by_image(threat: Threat, x: Tensor) -> None:
    model = network(1)
    y = model(x).argmax(1)
    asked = plan("mifgsm", "steps=6", "restarts=3")
    assert (asked.momentum, asked.restarts, asked.size(Threat(threat.norm, 0.6))) == (1.0, 1, pytest.approx(0.1))
    (found,) = crafted(model, x, y, threat, asked, seed=0, chunk=0)
    assert (predict(model, found) != y).any()
    for image, label, adv in zip(x[:12], y.tolist(), found, strict=False):
        mine, g = image, torch.zeros_like(image)
        for _ in range(6):
            new = gradient(model, mine, label)
            g = g + new / new.abs().mean()
            step = g.sign() if threat.norm == "linf" else g / g.norm()
            mine = clip(mine + threat.eps / 6 * step, image, threat)
        torch.testing.assert_close(adv, mine, rtol=0, atol=1e-12)


def test_mifgsm_in_l1_keeps_its_momentum_and_steps(x: Tensor) -> None:
    model, threat, asked = network(1), Threat("l1", 2.0), plan("mifgsm", "steps=6")
    y = model(x).argmax(1)
    (found,) = crafted(model, x, y, threat, asked, seed=0, chunk=0)
    mine = pgd(model, x, y, region=threat.region(x, APGD_L1_SHARE), start_BCHW=x, loss="ce", steps=6, step_size=2 / 6,
               momentum=1.0)
    assert torch.equal(found, mine) and (predict(model, found) != y).any()
    assert plan("pgd", "steps=6").size(threat) == plan("fgsm").size(threat) == 2.0  # APGD's first step


def test_momentum_zero_is_pgd_and_a_zero_gradient_is_no_step(x: Tensor) -> None:
    model, region = network(1), LINF.region(x)
    y = model(x).argmax(1)
    one, other = (pgd(model, x, y, region=region, start_BCHW=x, loss="ce", steps=4, step_size=0.02, momentum=momentum)
                  for momentum in (None, 0.0))
    assert torch.equal(one, other)
    flat = pgd(lambda x: 0 * x.flatten(1), x, y, region=region, start_BCHW=x, loss="ce", steps=2, step_size=0.02,
               momentum=1.0)
    assert torch.equal(flat, x)


@pytest.mark.parametrize("threat", [LINF, L2], ids=lambda t: t.norm)
def test_targeted_pgd_leads_to_each_likely_wrong_class_and_the_worst_counts(threat: Threat, x: Tensor) -> None:
    model = network(2)
    y = model(x).argmax(1)
    asked = plan("targeted", "steps=4", "targets_per_image=3")
    batches = list(crafted(model, x, y, threat, asked, seed=3, chunk=2))
    assert len(batches) == 3
    for rank, found in enumerate(batches):
        start = threat.region(x).start("uniform", stream=rng.key(3, f"eval-{threat.norm}", rank, 2))
        for image, label, mine, adv in zip(x[:12], y.tolist(), start, found, strict=False):
            order = model(image[None])[0].argsort(descending=True).tolist()
            order.remove(label)
            for _ in range(4):
                g = -gradient(model, mine, order[rank])
                step = g.sign() if threat.norm == "linf" else g / g.norm()
                mine = clip(mine + 2.5 * threat.eps / 4 * step, image, threat)
            torch.testing.assert_close(adv, mine, rtol=0, atol=1e-12)


def test_targets_are_at_most_the_wrong_classes(x: Tensor) -> None:
    model = network(2)
    y = model(x).argmax(1)
    found = torch.stack(likely_wrong(model, x, y, 9), 1)
    assert torch.equal(found, model(x).argsort(1, descending=True)[:, 1:]) and found.shape[1] == CLASSES - 1


def test_targeted_pgd_breaks_saturated_logits_where_the_cross_entropy_has_no_gradient(x: Tensor) -> None:
    model = network(2, scale=1e8)
    y = model(x).argmax(1)
    broken = {name: sum(int((predict(model, adv) != y).sum()) for adv in crafted(
        model, x, y, LINF, AttackPlan(10, loss=loss, targets=targets, start="zero"), seed=0, chunk=0))
        for name, loss, targets in (("pgd", "ce", 0), ("targeted", "ce_targeted", 1))}
    assert broken["pgd"] == 0 and broken["targeted"] >= 5


def test_plans_take_steps_restarts_and_step_size_where_they_have_them() -> None:
    words = ("steps=7", "restarts=2", "step_size=0.01")
    assert plan("pgd", *words) == AttackPlan(7, 2, 0.01) and plan("cw", *words) == AttackPlan(7, 2, 0.01, "margin")
    assert plan("fgsm", *words) == AttackPlan(1, start="zero")
    assert plan("targeted", *words) == AttackPlan(7, 2, 0.01, "ce_targeted", targets=3)
    assert plan("mifgsm", *words) == AttackPlan(7, 1, 0.01, start="zero", momentum=1.0, reach=1.0)


# ------------------------------------------------------------------------------------------------ noise and search


@pytest.mark.parametrize("threat", [LINF, L2], ids=lambda t: t.norm)
@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_noise_fills_the_ball_and_stays_inside(kind: str, threat: Threat) -> None:
    x = torch.full((200, 1, 8, 8), 0.5)
    found = noisy(kind, x, threat, stream=4)
    lengths = threat.distance(found, x) / threat.eps
    assert lengths.max() <= 1 + 1e-6 and lengths.median() > 0.9
    assert torch.equal(found, noisy(kind, x, threat, stream=4))
    assert not torch.equal(found, noisy(kind, x, threat, stream=5))
    if threat.norm == "linf":  # uniform: E|d| = eps / 2; normal of eps / 2, cut at two deviations: 0.391 eps
        assert ((found - x).abs().mean() / threat.eps).item() == pytest.approx(0.5 if kind == "uniform" else 0.391,
                                                                              abs=0.01)


def test_patches_change_a_pixel_by_the_width_of_the_ball() -> None:
    x = torch.zeros(1, 3, 32, 32)
    assert patch_change(Threat("linf", 0.1), x) == pytest.approx(0.2)
    for norm, eps in (("l2", 0.5), ("l1", 12.0)):
        patch = torch.zeros_like(x)
        patch[:, :, :8, :8] = patch_change(Threat(norm, eps), x)
        assert Threat(norm, eps).distance(patch, x).item() == pytest.approx(2 * eps)


@pytest.mark.parametrize("name", [name for name, kind in MENU.items() if kind.maker != "package"])
@pytest.mark.parametrize("norm", known_norms())
def test_each_of_our_attacks_stays_in_the_ball_and_is_reproducible(name: str, norm: str) -> None:
    if MENU[name].norm not in ("", norm):
        pytest.skip("not its norm")
    x = rng.uniform(1, (6, 1, 4, 4))
    model, threat = network(1).float(), Threat(norm, 0.3)
    y = model(x).argmax(1)
    plans = attack_plans(Request(attacks=(name,), steps=3), Config())
    job = Job((threat,), plans, (name,), "standard", (), True, 0, 30)
    one, other = (torch.stack(list(made(name, model, x, y, threat, job, 1, []))) for _ in range(2))
    assert torch.equal(one, other)
    for adv in one:
        assert adv.min() >= 0 and adv.max() <= 1 and threat.distance(adv, x).max() <= 0.3 * (1 + 1e-6)


# ------------------------------------------------------------------------------------------------ votes


def vote_job(*attacks: str) -> Job:
    return Job((LINF,), {"pgd": AttackPlan(5)}, attacks, "standard", (), False, 0, 60)


def test_a_vote_withstands_an_image_only_if_it_withstands_every_candidate(x: Tensor) -> None:
    """Candidates: AEs on both surrogates and on every member, and a search on the vote, though no peer is a target."""
    peers = [network(seed) for seed in (4, 5, 6)]
    (target,) = make_targets(["ensemble:vote"], ["a", "b", "c"], peers)
    y, job = predict(target.model, x), vote_job("pgd")
    clean, tried = attack_targets([target], x, y, job, 3)
    assert list(clean) == ["ensemble:vote"] and list(tried) == [("ensemble:vote", LINF.label)]
    one = tried["ensemble:vote", LINF.label]
    assert list(one.predictions) == ["pgd", "search", TRANSFER] and list(one.sources) == ["a", "b", "c"]
    candidates = [adv for model in (*target.attacked, *peers)
                  for adv in crafted(model, x, y, LINF, AttackPlan(5), seed=0, chunk=3)]
    candidates += made("search", target.model, x, y, LINF, job, 3, [])
    held = torch.stack([predict(target.model, adv) == y for adv in candidates]).all(0)
    assert torch.equal(one.held(y, y, one.predictions), held) and 0 < held.sum() < len(y)


def test_a_search_breaks_a_vote_whose_surrogates_have_no_gradient(x: Tensor) -> None:
    peers = [network(4, scale=1e8)] * 3
    (target,) = make_targets(["ensemble:vote"], ["a", "b", "c"], peers)
    y = predict(target.model, x)
    job = Job((LINF,), {"pgd": AttackPlan(5, start="zero")}, ("pgd",), "standard", (), False, 0, 60)
    _, tried = attack_targets([target], x, y, job, 0)
    broken = {name: int((p != y).sum()) for name, p in tried["ensemble:vote", LINF.label].predictions.items()}
    assert broken["pgd"] == broken[TRANSFER] == 0 and broken["search"] > 5


@pytest.mark.parametrize("rule", ["prob", "logit"])
def test_members_aes_join_the_candidates_of_every_ensemble(rule: str, x: Tensor) -> None:
    peers = [network(seed) for seed in (4, 5)]
    (target,) = make_targets([f"ensemble:{rule}"], ["a", "b"], peers)
    y = predict(target.model, x)
    _, tried = attack_targets([target], x, y, vote_job("pgd"), 0)
    one = tried[target.name, LINF.label]
    assert list(one.predictions) == ["pgd", TRANSFER] and list(one.sources) == ["a", "b"]
    counts = examine(target, x, y, {LINF.label: one}, vote_job("pgd"), 0)[LINF.label]
    assert counts["transfer"] == int(((one.predictions["pgd"] == y) & (one.predictions[TRANSFER] != y)).sum())


def test_aes_of_another_target_are_kept_where_they_alone_fool(x: Tensor) -> None:
    """What save=true writes reaches the headline: b has a's classes, and gradients too."""
    targets = make_targets(["a", "b"], ["a", "b"], [network(4, scale=1e8), network(4)])
    y = predict(targets[0].model, x)
    job = replace(vote_job("pgd"), plans={"pgd": AttackPlan(5, start="zero")}, transfer=True)
    _, tried = attack_targets(targets, x, y, job, 0)
    one = tried["a", LINF.label]
    assert (one.predictions["pgd"] == y).all() and (one.predictions[TRANSFER] != y).sum() > 5
    assert torch.equal(predict(targets[0].model, strongest(one, y)), one.predictions[TRANSFER])


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, nn.Module]]:
    """pyautoattack replaced by something that breaks the first three images -> (attack, module) of every call."""
    calls = []

    def fake(model: nn.Module, x_BCHW: Tensor, y_B: Tensor, threat: Threat, *, version: str, custom: tuple[str, ...],
             seed: int, alone: str | None = None) -> AutoAttacked:
        assert (version, custom, seed) == ("standard", (), chunk_seed(0, threat.norm, 2))
        calls.append((alone or "autoattack", model))
        adv = x_BCHW.clone()
        adv[:3] = 1 - adv[:3]
        return AutoAttacked(adv, 7, (), ())

    monkeypatch.setattr(attacks, "autoattack", fake)
    return calls


def test_a_vote_is_attacked_by_square_itself_where_pyautoattack_is_asked_for(x: Tensor, package: list[Any]) -> None:
    (target,) = make_targets(["ensemble:vote"], ["a", "b"], [network(4), network(5)])
    y = predict(target.model, x)
    one = attack_one(target, x, y, y, LINF, vote_job("apgd-ce", "autoattack"), 2)
    assert list(one.predictions) == ["apgd-ce", "autoattack", "square"]
    logit, prob = target.attacked
    assert package == [("apgd-ce", logit), ("apgd-ce", prob), ("autoattack", logit), ("autoattack", prob),
                       ("square", target.model)]
    assert one.square_broke == 7  # the worse surrogate's; Square on the vote has nothing to be compared with


def test_square_alone_is_compared_with_the_gradient_attacks(x: Tensor, package: list[Any]) -> None:
    model = network(4)
    (target,) = make_targets(["a"], ["a"], [model])
    y = predict(model, x)
    strong, weak = AttackPlan(20), AttackPlan(1, step_size=1e-9, start="zero")
    for eps, plan, some in ((0.5, strong, False), (0.1, weak, True)):
        threat = Threat("linf", eps)
        job = Job((threat,), {"pgd": plan}, ("square", "pgd"), "standard", (), False, 0)
        one = attack_one(target, x, y, y, threat, job, 2)
        alone = (one.predictions["square"] != y) & (one.predictions["pgd"] == y)
        assert one.square_broke == int(alone.sum()) and bool(alone.any()) == some
        assert list(one.predictions) == ["square", "pgd"] and (one.predictions["square"] != y).any()


def test_a_vote_gets_a_gradient_free_attack_unless_one_is_asked_for() -> None:
    assert stand_in(("pgd", "cw")) == "search" and stand_in(("pgd", "autoattack")) == "square"
    assert stand_in(("square", "pgd")) is stand_in(("search", "autoattack")) is None


# ------------------------------------------------------------------------------------------------ radii


def asked(*threats: str, data: str = "cifar10", attacks: str = "autoattack") -> list[Threat]:
    request = parse(["runs/x", f"threats={','.join(threats)}", f"attacks={attacks}"]).request
    return threats_asked(request, [Threat("linf", 0.1), Threat("linf", 0.2), Threat("l2", 0.3)], data)


@pytest.mark.parametrize(("words", "idle"), [
    ("attacks=autoattack steps=100 restarts=5 version=plus", "steps restarts"), ("attacks=pgd,cw steps=100", ""),
    ("attacks=pgd version=plus queries=5 targets_per_image=9", "targets_per_image queries version"),
    ("attacks=mifgsm steps=9 step_size=0.1 restarts=2", "restarts"),
    ("attacks=fgsm,uniform step_size=0.1", "step_size"),
    ("attacks=targeted,search targets_per_image=9 queries=9", ""), ("attacks=pgd", ""),
    ("attacks=pgd targets=ensemble:vote queries=9", ""), ("attacks=square targets=ensemble:vote queries=9", "queries")])
def test_settings_that_no_attack_reads_are_known(words: str, idle: str) -> None:
    assert parse(["runs/x", *words.split()]).request.idle == idle.split()


def test_a_run_that_made_no_test_is_attacked_with_the_default_number_of_steps() -> None:
    config = load_config(None, ["eval.test_steps=0"])
    assert attack_plans(Request(attacks=("pgd",)), config)["pgd"].steps == 20


def test_radii_by_name_are_those_of_the_literature() -> None:
    assert asked("standard") == [Threat("linf", 8 / 255), Threat("l2", 0.5)]  # the norms of the peers
    assert asked("standard", data="fashion_mnist") == [Threat("linf", 0.3), Threat("l2", 2.0)]
    assert asked("l1:standard", "linf:imagenet") == [Threat("l1", 12.0), Threat("linf", 4 / 255)]
    assert asked("l2:standard", data="svhn") == [Threat("l2", 128 / 255)]
    assert asked("union:eat") == [Threat("linf", 8 / 255), Threat("l2", 0.5), Threat("l1", 12.0)]
    assert asked("union:msd")[0] == Threat("linf", 0.03)
    assert [t.label for t in asked("union:mng")] == ["linf 8/255", "l2 128/255", "l1 2000/255"]


def test_a_norm_alone_has_its_standard_radius_or_the_one_beside_it() -> None:
    assert asked("l2", "l1") == [Threat("l2", 0.5), Threat("l1", 12.0)]  # not the 0.3 of the peers
    assert asked("l2", data="svhn") == [Threat("l2", 128 / 255)]
    request = parse(["runs/x", "threats=l2", "eps=1/4"]).request
    assert threats_asked(request, [Threat("linf", 0.1)], "digits") == [Threat("l2", 0.25)]


@pytest.mark.parametrize(("threats", "data", "text"), [
    ("l2", "digits", "no standard radius in l2 for digits .* write norm:eps"),
    ("standard", "digits", "no standard radius in .* for digits .* cifar10, cifar100, svhn, mnist"),
    ("l1:standard", "svhn", "no standard radius in l1 for svhn .* write norm:eps"),
    ("union:all", "cifar10", "there is no union 'all' .* eat, msd, mng"),
    ("linf:cifar", "cifar10", "'linf:cifar' is not a threat"),
    ("linf:0.1,linf:1/10", "cifar10", "a threat is asked for twice"),
    ("union:eat,linf:standard", "cifar10", "a threat is asked for twice")])
def test_a_radius_that_has_no_name_is_refused(threats: str, data: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        asked(threats, data=data)


# ------------------------------------------------------------------------------------------------ documents


def test_the_documents_list_the_attacks() -> None:
    rows = table("docs/evaluation.md", "## Attacks")
    assert [row[0].strip("`") for row in rows] == list(MENU)


def test_the_documents_list_the_radii() -> None:
    rows = table("docs/evaluation.md", "## Radii by name")
    shown = {row[0].strip("`"): row[1:4] for row in rows}
    named = {**data_sets(), **{f"union:{name}": radii for name, radii in UNIONS.items()}}
    assert list(shown) == list(named)
    for name, cells in shown.items():
        for norm, cell in zip(("linf", "l2", "l1"), cells, strict=True):
            top, _, bottom = cell.partition("/")
            value = float(top) / float(bottom or 1) if cell != "-" else None
            assert value == (None if norm not in named[name] else pytest.approx(named[name][norm])), (name, norm)
            assert value is None or math.isfinite(value)
