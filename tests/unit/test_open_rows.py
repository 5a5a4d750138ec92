"""What an evaluation saves, folded copies and images that are decided, changes no number of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.norms import Threat
from mat_dist.config.schema import Config, DataConfig
from mat_dist.data import as_float, load_data
from mat_dist.distributed.stopping import StopFlag
from mat_dist.evaluation import attacks, soundness
from mat_dist.evaluation.attacks import AttackPlan, Job, OpenRows, Target, attack_one, attack_targets, predict
from mat_dist.evaluation.chunks import Interrupted, Progress, Work
from mat_dist.evaluation.settings import MENU, Request, made_by
from mat_dist.evaluation.soundness import examine
from mat_dist.evaluation.targets import attack_plans, make_targets

OURS = tuple(made_by(MENU, "pgd", "noise", "search"))
THREATS = (Threat("linf", 0.08), Threat("l2", 0.4), Threat("l1", 1.0))
COUNT = 24
Images = tuple[Tensor, Tensor]


def small_net(seed: int, x: Tensor, y: Tensor) -> nn.Module:
    """A CNN with batch norm in fp32, trained for a moment."""
    with rng.keyed_rng(seed):
        model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                              nn.Flatten(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for epoch in range(3):
        for rows in rng.permutation(epoch, len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows] + 0.1 * rng.normal(epoch, x[rows].shape)), y[rows]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def digits() -> tuple[Images, Images]:
    data = load_data(DataConfig(), seed=0, batch_size=64)
    (x, y), (x_test, y_test) = data.train.batch(torch.arange(600)), data.test.batch(torch.arange(COUNT))
    return (as_float(x), y), (as_float(x_test), y_test)


@pytest.fixture(scope="module")
def targets(digits: tuple[Images, Images]) -> list[Target]:
    peers = [small_net(seed, *digits[0]) for seed in (1, 2)]
    return make_targets(["a", "ensemble:vote"], ["a", "b"], peers)


def asked(threat: Threat, restarts: int) -> Job:
    plans = attack_plans(Request(attacks=OURS, steps=3, restarts=restarts), Config())
    return Job((threat,), plans, OURS, seed=3, queries=8)


@pytest.mark.parametrize("threat", [THREATS[0], *(pytest.param(t, marks=pytest.mark.thorough) for t in THREATS[1:])],
                         ids=lambda t: t.norm)
def test_folded_copies_and_decided_images_change_no_prediction_and_no_check(
        threat: Threat, targets: list[Target], digits: tuple[Images, Images], monkeypatch: pytest.MonkeyPatch) -> None:
    """All attacks of ours with three restarts, their transfer, and the counts of all checks, image by image."""
    x, y = digits[1]
    job = asked(threat, 3)
    passes = {"": 0}
    monkeypatch.setattr(soundness, "SEARCH_QUERIES", 20)
    monkeypatch.setattr(soundness, "OWN_STEPS", 3)

    def count(model: nn.Module, given: tuple[Tensor]) -> None:
        passes[""] += len(given[0])

    def everything() -> tuple[list[object], list[Tensor], int]:
        passes[""] = 0  # images through a last layer
        clean, tried = attack_targets(targets, x, y, job, 1)
        found: list[object] = [{name: p.tolist() for name, p in one.predictions.items()} for one in tried.values()]
        found += [{name: p.tolist() for name, p in one.sources.items()} for one in tried.values()]
        found += [examine(t, x, y, {threat.label: tried[t.name, threat.label]}, job, 1) for t in targets]
        right = [one.held(clean[name], y, one.predictions) for (name, _), one in tried.items()]
        return found, right, passes[""]

    hooks = [layer.register_forward_pre_hook(count) for t in targets for layer in t.model.modules()
             if isinstance(layer, nn.Linear)]
    saving, right, few = everything()
    monkeypatch.setattr(attacks, "folded", lambda model, sample: model)
    monkeypatch.setattr(soundness, "folded", lambda model, sample: model)
    monkeypatch.setattr(attacks, "OpenRows", lambda model, open_B: model)
    monkeypatch.setattr(soundness, "OpenRows", lambda model, open_B: model)
    plain, same, many = everything()
    for hook in hooks:
        hook.remove()
    assert saving == plain and all(map(torch.equal, right, same))
    assert all(0 < held.sum() < COUNT for held in right[:2])
    assert few < 0.9 * many


def test_later_restarts_leave_out_what_is_broken(targets: list[Target], digits: tuple[Images, Images]) -> None:
    """Images through the network: clean ones and each restart's open ones, once per step; all in each prediction."""
    x, y = digits[1]
    model, steps, starts = targets[0].model, 4, 5
    job = replace(asked(THREATS[0], starts), attacks=("pgd",), plans={"pgd": AttackPlan(steps, starts)})
    clean_B, held = predict(model, x), predict(model, x) == y
    expected, restarts = 0, 0
    for number in range(starts):
        if not held.any():
            break
        expected, restarts = expected + steps * int(held.sum()), restarts + 1
        adv = attacks.craft(model, x, y, job.threats[0], job.plans["pgd"], seed=3, chunk=0, restart=number)
        held &= predict(model, adv) == y
    batches: list[int] = []
    hook = model.register_forward_pre_hook(lambda model, given: batches.append(len(given[0])))
    try:
        tried = attack_one(Target("a", model, (model,)), x, y, clean_B, job.threats[0], job, 0)
    finally:
        hook.remove()
    assert torch.equal(tried.predictions["pgd"] == y, held)
    assert sum(n for n in batches if n > 2) == expected + restarts * COUNT  # 1 and 2: looks at gradients and copies


def test_an_answer_is_that_of_the_model_itself(targets: list[Target], digits: tuple[Images, Images],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that calls everything broken changes no answer."""
    x, y = digits[1]
    monkeypatch.setattr(attacks, "folded", lambda model, sample: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    one = attack_one(targets[0], x, y, predict(targets[0].model, x), THREATS[0], asked(THREATS[0], 1), 0)
    for name, adv_BCHW in one.advs.items():
        assert torch.equal(one.predictions[name], predict(targets[0].model, adv_BCHW))


def test_rows_that_are_asked_about_get_the_models_logits_and_others_zeros(targets: list[Target],
                                                                          digits: tuple[Images, Images]) -> None:
    x, model = digits[1][0].clone().requires_grad_(True), targets[0].model
    open_B = torch.arange(COUNT) % 3 == 0
    logits = OpenRows(model, open_B)(x)
    torch.testing.assert_close(logits[open_B], model(x[open_B]))
    (grad,) = torch.autograd.grad(logits.square().sum(), x)
    for found in (logits, grad):
        assert (found[~open_B] == 0).all() and (found[open_B].flatten(1).abs().amax(1) > 0).all()
    assert OpenRows(model, torch.zeros_like(open_B))(x).shape == logits.shape
    assert torch.equal(OpenRows(model, torch.ones_like(open_B))(x), model(x))


def test_a_model_that_is_copied_is_not_touched(targets: list[Target], digits: tuple[Images, Images]) -> None:
    """Others may use it meanwhile: no tensor is written to, be it for a moment."""
    model = targets[0].model
    tensors = [*model.parameters(), *model.buffers()]
    before = [(t._version, t.clone()) for t in tensors]
    assert attacks.folded(model, digits[1][0][:2]) is not model
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert attacks.folded(plain, digits[1][0][:2]) is plain  # nothing to fold: whatever else it holds is not copied
    for tensor, (version, value) in zip(tensors, before, strict=True):
        assert tensor._version == version and torch.equal(tensor, value)


def test_a_signal_is_obeyed_in_a_pass_of_a_folded_copy(targets: list[Target], digits: tuple[Images, Images]) -> None:
    """A copy is watched with its network, and does not copy who watches."""
    x, y = digits[1]
    config, stop = Config(), StopFlag()
    data = load_data(config.data, seed=0, batch_size=64).test
    job = replace(asked(THREATS[0], 1), attacks=("pgd",))

    class Screen:
        def status(self, *told: object) -> None: ...
        def note(self, text: str) -> None: ...

    progress = Progress(Work(config, job, targets[:1], data, torch.arange(COUNT)), [0], stop, Screen())
    with progress.watching():
        progress.chunk()
        copy = attacks.folded(targets[0].model, x[:2])
        assert copy is not targets[0].model
        copy(x)
        stop.reason = "a test"
        with pytest.raises(Interrupted):
            copy(x)
    assert y.shape == (COUNT,)
