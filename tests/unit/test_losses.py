"""Losses against numbers worked out by hand, and what must hold for any logits."""

from __future__ import annotations

from collections.abc import Callable
from math import log

import pytest
import torch
from torch import Tensor

from mat_dist.core import losses
from mat_dist.core.graph import CLEAN, CohortGraph, View
from mat_dist.core.state_hash import state_hash
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.placement import Placement
from mat_dist.methods import mart, ramp
from tests.cohorts import cohort_config, make_peer, nets, train

LN2 = log(2)
UNASKED = torch.zeros(2, dtype=torch.int64)  # labels where teachers are listened to everywhere


def logits(*rows: tuple[float, ...]) -> Tensor:
    """Float64 logits whose softmax is each row of probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ hand-computed


def test_cross_entropy_is_the_mean_of_minus_log_probabilities() -> None:
    p = logits((1 / 2, 1 / 4, 1 / 4), (1 / 8, 1 / 8, 3 / 4))
    assert losses.cross_entropy(p, torch.tensor([0, 1])).item() == pytest.approx((LN2 + 3 * LN2) / 2)


def test_label_smoothing_mixes_the_label_with_the_uniform_distribution() -> None:
    p = logits((1 / 2, 1 / 4, 1 / 4))
    # 0.7 * ln 2 + 0.3 / 3 * (ln 2 + ln 4 + ln 4)
    assert losses.cross_entropy(p, torch.tensor([0]), 0.3).item() == pytest.approx(1.2 * LN2)


def test_kl_has_the_target_first() -> None:
    p, q = logits((1 / 2, 1 / 4, 1 / 4)), logits((1 / 4, 1 / 2, 1 / 4))
    skew = logits((1 / 8, 3 / 8, 1 / 2))
    assert losses.kl_divergence(p, q).item() == pytest.approx(LN2 / 4)
    assert losses.kl_divergence(p, skew).item() == pytest.approx(log(4) / 2 + log(2 / 3) / 4 + log(1 / 2) / 4)
    assert losses.kl_divergence(p, skew).item() != pytest.approx(losses.kl_divergence(skew, p).item())


def test_kl_is_summed_over_classes_and_averaged_over_the_batch() -> None:
    p = logits((1 / 2, 1 / 4, 1 / 4), (1 / 2, 1 / 4, 1 / 4))
    q = logits((1 / 4, 1 / 2, 1 / 4), (1 / 2, 1 / 4, 1 / 4))
    assert losses.kl_divergence(p, q).item() == pytest.approx(LN2 / 8)


def test_the_softened_kl_compares_the_adversarial_with_the_clean_prediction() -> None:
    clean, adv = logits((1 / 2, 1 / 4, 1 / 4)), logits((1 / 8, 3 / 8, 1 / 2))
    expected = log(4) / 2 + log(2 / 3) / 4 + log(1 / 2) / 4
    assert losses.softened_kl(clean + 3, adv - 5).item() == pytest.approx(expected)  # logits count up to a constant


def test_the_logit_distance_is_the_mean_squared_difference() -> None:
    clean, adv = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 4.0], [0.0, 4.0]])
    assert losses.logit_distance(clean, adv).item() == pytest.approx(13 / 4)


def test_distillation_is_the_mean_divergence_from_each_teacher() -> None:
    """Teachers that contradict each other do not cancel."""
    student, teachers = logits((1 / 2, 1 / 2)), [logits((9 / 10, 1 / 10)), logits((3 / 10, 7 / 10))]
    entropy = [-(p * log(p) + (1 - p) * log(1 - p)) for p in (0.9, 0.3)]
    assert losses.distillation(student, teachers, UNASKED).item() == pytest.approx(LN2 - sum(entropy) / 2)
    opposite = [logits((9 / 10, 1 / 10)), logits((1 / 10, 9 / 10))]
    assert losses.distillation(student, opposite, UNASKED).item() == pytest.approx(LN2 - entropy[0])


def test_the_temperature_divides_both_sides_and_its_square_multiplies() -> None:
    student, teacher = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[2 * log(3), 0.0]], dtype=torch.float64)
    plain = 3 / 4 * log(3 / 2) + 1 / 4 * log(1 / 2)  # softmax of (ln 3, 0) is (3/4, 1/4)
    assert losses.distillation(student, [teacher], UNASKED, temperature=2.0).item() == pytest.approx(4 * plain)


def test_the_gradient_keeps_its_size_at_high_temperature() -> None:
    """Hinton et al. (2015): for T -> infinity the gradient of T^2 KL tends to (s - t) / K of centred logits."""
    s, t = gaussian(1, 5).requires_grad_(), gaussian(1, 5, seed=1)
    (g,) = torch.autograd.grad(losses.distillation(s, [t], UNASKED, temperature=1000.0), s)
    centred = (s - s.mean()) - (t - t.mean())
    assert torch.allclose(g, centred.detach() / 5, atol=1e-3)


def test_accuracy_counts_the_largest_logit() -> None:
    guesses = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    assert losses.accuracy(guesses, torch.tensor([1, 1, 1])).item() == pytest.approx(2 / 3)


def test_a_temperature_softens_both_predictions() -> None:
    clean, adv = torch.tensor([[2 * LN2, 0.0]]), torch.tensor([[0.0, 0.0]])
    # softmax(z / 2): 2/3, 1/3 against 1/2, 1/2; times 4
    expected = 4 * (2 / 3 * log(4 / 3) + 1 / 3 * log(2 / 3))
    assert losses.softened_kl(clean, adv, 2.0).item() == pytest.approx(expected, rel=1e-6)


def test_the_worst_ae_of_each_image_counts_and_gets_the_gradient() -> None:
    one = logits((1 / 2, 1 / 2), (1 / 8, 7 / 8)).requires_grad_()
    other = logits((1 / 4, 3 / 4), (1 / 2, 1 / 2)).requires_grad_()
    value = losses.worst_cross_entropy([one, other], torch.tensor([0, 0]))
    value.backward()
    assert value.item() == pytest.approx((2 * LN2 + 3 * LN2) / 2)
    assert one.grad[0].abs().sum() == 0 == other.grad[1].abs().sum()
    assert one.grad[1].tolist() == pytest.approx([-7 / 16, 7 / 16])


def test_label_smoothing_counts_in_the_comparison() -> None:
    """Hard labels find the second AE worse, smoothing 0.9 over two classes the first."""
    one, other = logits((0.45, 0.55)), logits((0.40, 0.60))
    hard = losses.worst_cross_entropy([one, other], torch.tensor([0])).item()
    soft = losses.worst_cross_entropy([one, other], torch.tensor([1]), 0.5).item()
    assert hard == pytest.approx(-log(0.40))
    assert soft == pytest.approx(max(-0.75 * log(b) - 0.25 * log(a) for a, b in ((0.45, 0.55), (0.40, 0.60))))


@pytest.mark.parametrize("where,expected", [("teacher_right", [True, False, True]),
                                            ("student_wrong", [True, False, False])])
def test_a_student_listens_where_the_teacher_is_right_and_perhaps_where_it_is_wrong_itself(where: str,
                                                                                       expected: list[bool]) -> None:
    teacher = logits((1 / 2, 1 / 4, 1 / 4), (1 / 4, 1 / 2, 1 / 4), (1 / 2, 1 / 4, 1 / 4))
    student = logits((1 / 4, 1 / 2, 1 / 4), (1 / 4, 1 / 2, 1 / 4), (1 / 2, 1 / 4, 1 / 4))
    assert losses.listened(teacher, student, torch.tensor([0, 0, 0]), where).tolist() == expected


def test_an_image_on_which_nobody_is_listened_to_counts_as_zero_in_the_mean() -> None:
    student, teachers = logits((1 / 4, 3 / 4), (1 / 2, 1 / 2)), [logits((1 / 2, 1 / 2), (3 / 4, 1 / 4))]
    second = losses.kl_divergence(teachers[0][1:], student[1:]).item()
    value = losses.distillation(student, teachers, torch.tensor([1, 0]), where="teacher_right").item()
    assert value == pytest.approx(second / 2)


def test_logit_distillation_is_the_mean_square_over_images_classes_and_teachers() -> None:
    student = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    teachers = [torch.zeros(2, 2), torch.ones(2, 2)]
    assert losses.distillation(student, teachers, UNASKED, kind="mse").item() == pytest.approx((5 / 4 + 3 / 4) / 2)


# ------------------------------------------------------------------------------------------------ of methods


def test_boosted_cross_entropy_pushes_the_largest_wrong_class_down() -> None:
    p = logits((1 / 2, 1 / 4, 1 / 4), (1 / 8, 5 / 8, 1 / 4))
    # -ln 1/2 - ln(1.0001 - 1/4), and -ln 1/8 - ln(1.0001 - 5/8): the largest wrong one, not the largest but one
    expected = (LN2 - log(0.7501) + 3 * LN2 - log(0.3751)) / 2
    assert mart.boosted_cross_entropy(p, torch.tensor([0, 0])).item() == pytest.approx(expected, rel=1e-10)


def test_marts_labels_take_the_weight_of_teachers_while_a_peer_warms_up() -> None:
    config = cohort_config("mart", 2, loss={"kd_weight": 0.25, "kd_clean": 0.5, "warmup_epochs": 1.0})
    peer, y = make_peer(nets(1)[0], config), torch.tensor([0, 0])
    own = logits((1 / 2, 1 / 4, 1 / 4), (1 / 8, 5 / 8, 1 / 4))
    clean = logits((1 / 2, 1 / 4, 1 / 4), (1 / 4, 1 / 4, 1 / 2))
    views, boosted = {View(0): own, CLEAN: clean}, mart.boosted_cross_entropy(own, y)
    for warming_up, weight in ((), 1 - 0.25), ({0}, 1 + 0.5):
        row = CohortGraph.of(config.peers, warming_up).peers[0]
        value = peer.hooks[0].loss(row, views, y, None) - 6 * mart.weighted_kl(clean, own, y)
        assert value.item() == pytest.approx(weight * boosted.item(), rel=1e-10)


def test_a_certain_error_has_a_finite_boosted_loss() -> None:
    z = torch.tensor([[0.0, 90.0]], requires_grad=True)
    value = mart.boosted_cross_entropy(z, torch.tensor([0]))
    value.backward()
    assert value.item() == pytest.approx(90 - log(1e-4), rel=1e-2) and z.grad.isfinite().all()


def test_mart_weighs_each_image_by_its_clean_doubt() -> None:
    clean = logits((1 / 2, 1 / 4, 1 / 4), (1 / 4, 1 / 2, 1 / 4))
    adv = logits((1 / 4, 1 / 2, 1 / 4), (1 / 8, 3 / 8, 1 / 2))
    first = LN2 / 4  # 1/2 ln 2 - 1/4 ln 2, doubt 1/2
    second = LN2 / 4 + log(4 / 3) / 2 - LN2 / 4  # 1/4 ln 2 + 1/2 ln (4/3) + 1/4 ln (1/2), doubt 3/4
    value = mart.weighted_kl(clean, adv, torch.tensor([0, 0])).item()
    assert value == pytest.approx((first / 2 + second * 3 / 4) / 2)


def test_ramp_pairs_predictions_of_images_that_are_right_on_the_first_norm() -> None:
    first = logits((1 / 2, 1 / 4, 1 / 4), (1 / 4, 1 / 2, 1 / 4))
    second = logits((1 / 4, 1 / 2, 1 / 4), (1 / 8, 3 / 8, 1 / 2))
    assert ramp.pairing(first, second, torch.tensor([0, 0])).item() == pytest.approx(LN2 / 4)  # one of two is right
    assert ramp.pairing(first, second, torch.tensor([2, 2])).item() == 0.0
    both = ramp.pairing(first, second, torch.tensor([0, 1])).item()
    assert both == pytest.approx((LN2 / 4 + log(4 / 3) / 2) / 2)


# ------------------------------------------------------------------------------------------------ for any logits


@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0])
def test_equal_predictions_have_divergence_0_and_others_more(temperature: float) -> None:
    z = gaussian(6, 4) * 5
    same = losses.distillation(z, [z.clone(), z + 2], UNASKED, temperature=temperature)
    other = losses.distillation(z, [z.flip(1), z.flip(1)], UNASKED, temperature=temperature)
    assert abs(same.item()) < 1e-12 < 1e-2 < other.item()


@pytest.mark.parametrize("term", [
    lambda a, b: losses.cross_entropy(a, torch.tensor([0, 2, 1]), 0.1),
    lambda a, b: losses.kl_divergence(b.log_softmax(-1), a.log_softmax(-1)),
    losses.softened_kl,
    losses.logit_distance,
    lambda a, b: mart.boosted_cross_entropy(a, torch.tensor([0, 2, 1])),
    lambda a, b: mart.weighted_kl(a, b, torch.tensor([0, 2, 1])),
    lambda a, b: losses.softened_kl(a, b, 3.0),
    lambda a, b: losses.worst_cross_entropy([a, b], torch.tensor([0, 2, 1]), 0.1),
    lambda a, b: ramp.pairing(a, b, a.argmax(-1)),
], ids=["ce", "kl", "softened", "distance", "bce", "mart", "softened-T", "worst", "ramp"])
def test_the_gradient_is_that_of_finite_differences(term: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert torch.autograd.gradcheck(term, (gaussian(3, 4).requires_grad_(), gaussian(3, 4, seed=1).requires_grad_()))


def test_the_gradient_of_distillation_is_that_of_finite_differences() -> None:
    teachers = [gaussian(3, 4, seed=1), gaussian(3, 4, seed=2)]
    student = gaussian(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: losses.distillation(s, teachers, UNASKED, temperature=2.0), (student,))


def test_probabilities_that_underflow_stay_finite() -> None:
    student = torch.zeros(1, 3, requires_grad=True)
    teachers = [torch.tensor([[0.0, -2000.0, -3000.0]]), torch.tensor([[0.0, -2500.0, -1000.0]])]
    assert (teachers[0].softmax(-1) == 0).sum() == 2  # the case that 0 * log 0 would spoil
    value = losses.distillation(student, teachers, UNASKED)
    value.backward()
    assert value.item() == pytest.approx(log(3), rel=1e-6)
    assert torch.allclose(student.grad, torch.tensor([[-2 / 3, 1 / 3, 1 / 3]]), atol=1e-6)


def test_a_student_that_excludes_the_teachers_class_has_a_large_finite_loss() -> None:
    student = torch.tensor([[-1000.0, 0.0]], requires_grad=True)
    value = losses.distillation(student, [torch.tensor([[1000.0, 0.0]])], UNASKED)
    value.backward()
    assert value.item() == pytest.approx(1000, rel=1e-3) and student.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------ in a cohort


@pytest.mark.parametrize("student", ["mat_kd", "dml_at", "mat", "mat_share"])
def test_what_a_student_learns_leaves_no_trace_in_its_teacher(student: str) -> None:
    """Peer 1 trains alone (at): beside a student that listens to it, and beside one that does not."""
    mesh, models = Mesh(Placement.place(2, 1, 0), torch.device("cpu")), nets(2)
    states = [train(cohort_config([preset, "at"], 2), mesh, models, 3).peers for preset in (student, "at")]
    listening, deaf = (state_hash(peers[1].state()) for peers in states)
    assert listening == deaf
    assert state_hash(states[0][0].state()) != state_hash(states[1][0].state())  # it did listen
