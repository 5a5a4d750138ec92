"""Parts of methods alone: unions against loops over images and norms, gradient projection against numbers by hand."""

from __future__ import annotations

import json
import random
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mat_dist import rng
from mat_dist.attacks.norms import Threat
from mat_dist.core.graph import View
from mat_dist.methods.ramp import project
from mat_dist.methods.unions import EatChoice, msd
from tests.cohorts import BATCH, batch, cohort_config, complete, first_view, make_peer, nets

THREATS = [Threat("linf", 0.1), Threat("l2", 0.5), Threat("l1", 1.5)]
SIZES = [0.03, 0.15, 0.5]


def model(images: Tensor) -> Tensor:
    """Two layers with tanh over 36 values, 4 classes, float64 inside."""
    one, two = rng.normal(1, (36, 12), dtype=torch.float64), rng.normal(2, (12, 4), dtype=torch.float64)
    return (3 * torch.tanh(images.double().flatten(1) @ one) @ two).to(images.dtype)


def some_images(count: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = rng.uniform(3, (count, 1, 6, 6), dtype=dtype)
    return x, model(x).argmax(1)


def loss_of(image: Tensor, label: Tensor) -> float:
    return F.cross_entropy(model(image[None]), label[None]).item()


def one_image(x: Tensor, y: Tensor, steps: int, tops: list[int]) -> tuple[Tensor, list[int]]:
    """MSD on one image (1, C, H, W) -> its best point, and the norm of each step."""
    z, best, highest, path = x, x, -1.0, []
    for top in tops[:steps]:
        leaf = z.clone().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
        options = []
        for threat, size in zip(THREATS, SIZES, strict=True):
            region = threat.region(x)
            options.append(region.project(region.step(z, g, size, top)))
        losses = [loss_of(option[0], y[0]) for option in options]
        path.append(max(range(3), key=lambda i: losses[i]))
        z = options[path[-1]]
        if losses[path[-1]] > highest:
            best, highest = z, losses[path[-1]]
    return best, path


def test_msd_goes_on_from_the_norm_that_raises_the_loss_most() -> None:
    x, y = some_images()
    tops = [5 + rng.key(9, "msd-top", number) % 16 for number in range(8)]
    assert min(tops) >= 5 and max(tops) <= 20 and len(set(tops)) > 3
    found = msd(model, x, y, regions=[t.region(x) for t in THREATS], step_sizes=SIZES, start_BCHW=x, loss="ce",
                steps=8, stream=9)
    used = set()
    for b in range(len(x)):
        best, path = one_image(x[b:b + 1], y[b:b + 1], 8, tops)
        assert (found[b] - best[0]).abs().max() < 1e-9
        used |= set(path)
    assert len(used) == 3


def test_an_msd_example_lies_in_one_of_the_regions() -> None:
    x, y = some_images(60, torch.float32)
    found = msd(model, x, y, regions=[t.region(x) for t in THREATS], step_sizes=[1.0, 5.0, 9.0], start_BCHW=x,
                loss="ce", steps=6, stream=2)
    inside = torch.stack([t.distance(found, x) <= t.eps * (1 + 1e-6) for t in THREATS])
    assert inside.any(0).all() and found.min() >= 0 and found.max() <= 1 and not found.requires_grad
    assert not inside.all()  # and not in all of them


def test_a_random_norm_is_keyed_and_even() -> None:
    """The same on all replicas, which know seed, step and stream."""
    def drawn(stream: int) -> list[int]:
        union = {"strategy": "random", "threats": "linf:0.1,l2:1,l1:0.5"}
        config = cohort_config("at", 1, entry={"stream": stream, "union": union})
        (hook,) = make_peer(nets(1)[0], config).hooks
        return [hook.choose(step) for step in range(3000)]
    assert drawn(1) == drawn(1) != drawn(2)
    assert all(abs(drawn(1).count(i) - 1000) < 100 for i in range(3))  # 4 standard deviations


def test_eat_prefers_the_norm_with_the_lower_running_robust_accuracy() -> None:
    """Counts and weights as by hand; frequencies as random.choices with these weights."""
    choice = EatChoice([0, 0], [0, 0])
    assert choice.weights() == [0.5, 0.5]
    choice.update(0, held=90, seen=100)
    assert choice.weights() == [0.5, 0.5]  # nothing is known of the other norm
    choice.update(1, held=20, seen=50)
    choice.update(1, held=10, seen=50)
    assert choice.weights() == pytest.approx([0.1 / 0.8, 0.7 / 0.8])
    drawn = [choice.choose(stream=rng.key(3, step)) for step in range(4000)]
    theirs = random.Random(0).choices([0, 1], weights=[0.1, 0.7], k=4000)
    assert abs(drawn.count(0) - theirs.count(0)) < 120  # 4 standard deviations of the difference


@pytest.mark.parametrize("method", ["pgd", "apgd"])
def test_eat_counts_images_that_are_right_at_every_point_of_the_attack(method: str) -> None:
    """Against the predictions at every batch that the model is called with."""
    (net,) = nets(1, dtype=torch.float64)
    attack = {"method": method, "steps": 5, "step_size": 0.2}  # from side to side of the ball
    config = cohort_config("at", 1, step={"precision": "fp64"}, entry={
        "attack": attack, "union": {"strategy": "eat", "threats": "linf:0.1,l2:1,l1:0.5"}})
    peer = make_peer(net, config)
    peer.attack_of_training._called = net  # not its copy: points are counted at the model
    (hook,) = peer.hooks
    points: list[Tensor] = []
    ends = throughout = 0
    for step in range(40):
        x, y = batch(step, dtype=torch.float64)
        points.clear()
        handle = net.register_forward_hook(lambda module, given, logits: points.append(logits.detach().argmax(1)))
        adv = first_view(peer, x, y, step)
        handle.remove()
        assert len(points) == 6
        right = sum(all(bool(point[b] == y[b]) for point in points) for b in range(len(y)))
        before = hook.state_dict()["eat"]
        hook.commit(step, hook.proposed())
        now = hook.state_dict()["eat"]
        assert [sum(now[key]) - sum(before[key]) for key in ("held", "seen")] == [right, BATCH]
        with torch.no_grad():
            net.eval()
            ends, throughout = ends + int((net(adv).argmax(1) == y).sum()), throughout + right
    told = peer.state()["methods"]["unions"]["eat"]
    assert sum(told["held"]) == throughout > 0 and sum(told["seen"]) == 40 * BATCH
    assert len(told["seen"]) == 2 and min(told["seen"]) > 0  # l2 is never drawn
    assert throughout < ends if method == "pgd" else throughout <= ends  # APGD's result is its worst point


def test_eat_without_a_weight_left_chooses_evenly() -> None:
    choice = EatChoice([10, 5], [10, 5])
    assert choice.weights() == [0.5, 0.5]


def test_eat_goes_on_from_its_state() -> None:
    one = EatChoice([3, 4], [10, 10])
    other = EatChoice(**json.loads(json.dumps(asdict(one))))
    one.update(0, 1, 10)
    assert other.weights() == pytest.approx([0.7 / 1.3, 0.6 / 1.3])
    assert [other.choose(stream=rng.key(1, s)) for s in range(50)] == [
        EatChoice([3, 4], [10, 10]).choose(stream=rng.key(1, s)) for s in range(50)]


# ------------------------------------------------------------------------------------------------ paired logits


@pytest.mark.parametrize("norms,pair", [(("l2", "linf", "l1"), (1, 2)), (("l1", "linf", "l2"), (1, 0)),
                                        (("l2", "linf"), (0, 1)), (("l2", "l1"), (0, 1))])
def test_ramp_pairs_linf_with_l1_or_else_the_first_norm_with_the_last(norms: tuple[str, ...],
                                                                      pair: tuple[int, int]) -> None:
    """Of specialists' AEs, and of its own."""
    config = complete({"peers": [*({"role": "specialist", "threat": {"norm": norm}} for norm in norms),
                                 {"role": "generalist", "union": {"strategy": "ramp"}}]})
    (hook,) = make_peer(nets(1)[0], config, index=len(norms)).hooks
    assert hook.couples(hook.peer.row) == tuple(View(place) for place in pair)
    union = {"strategy": "ramp", "threats": ",".join(f"{norm}:0.5" for norm in norms)}
    (hook,) = make_peer(nets(1)[0], cohort_config("at", 1, entry={"union": union})).hooks
    assert hook.couples(hook.peer.row) == tuple(View(0, place) for place in pair)


# ------------------------------------------------------------------------------------------------ gradient projection


def test_a_layer_keeps_of_the_natural_gradient_what_points_its_way() -> None:
    """g_a = (3, 4), g_n = (4, 3): cosine 24/25; half of 0.96 g_n and half of g_a."""
    layers = [torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.0]), torch.tensor(2.0), torch.tensor([0.0, 0.0])]
    natural = [torch.tensor([[4.0, 3.0]]), torch.tensor([-1.0, 5.0]), torch.tensor(9.0), torch.tensor([1.0, 1.0])]
    project(layers, natural, 0.5)
    assert layers[0].tolist() == [pytest.approx([0.5 * 0.96 * 4 + 1.5, 0.5 * 0.96 * 3 + 2])]
    assert layers[1].tolist() == [0.5, 0.0]  # against it: nothing of the natural one is left
    assert layers[2] == 2 and layers[3].tolist() == [0, 0]


def test_the_weight_is_that_of_the_natural_part() -> None:
    layers = [torch.tensor([3.0, 4.0])]
    project(layers, [torch.tensor([6.0, 8.0])], 0.25)
    assert layers[0].tolist() == pytest.approx([0.75 * 3 + 0.25 * 6, 0.75 * 4 + 0.25 * 8])


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_that_is_not_finite_stays_visible(which: int) -> None:
    pair = [[torch.ones(3)], [torch.ones(3)]]
    pair[which][0][1] = float("nan")
    project(pair[0], pair[1], 0.5)
    assert not pair[0][0].isfinite().all()
