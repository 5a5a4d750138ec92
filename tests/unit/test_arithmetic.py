"""TF32: evaluations never use it, whichever of torch's switches was set, and find everything as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import backends, nn
from torch.backends import cudnn, mkldnn

from mat_dist.attacks.attack_copy import AttackCopy
from mat_dist.distributed.arithmetic import strict_arithmetic
from mat_dist.distributed.groups import prepare_torch
from tests.cohorts import cohort_config

pytestmark = pytest.mark.alone  # torch's switches are those of the process, which other tests share side by side
PARTS: dict[str, Any] = {
    "all": backends, "cuda": cudnn, "mkldnn": mkldnn, "products": backends.cuda.matmul, "convolutions": cudnn.conv,
    "rnn": cudnn.rnn, "mkldnn products": mkldnn.matmul, "mkldnn convolutions": mkldnn.conv}
UNTOLD = "torch refuses to tell, since old and new switches differ"


def told(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return UNTOLD


def state() -> dict[str, Any]:
    return {**{name: part.fp32_precision for name, part in PARTS.items()},
            "old products": told(lambda: backends.cuda.matmul.allow_tf32), "old": told(lambda: cudnn.allow_tf32),
            "precision": told(torch.get_float32_matmul_precision), "flags": (cudnn.deterministic, cudnn.benchmark)}


def torch_as_it_comes() -> None:
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = True
    for part in PARTS.values():
        part.fp32_precision = "none"
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32"
    assert [state()[key] for key in ("convolutions", "all", "products", "mkldnn products")] == ["tf32", *["none"] * 3]


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """From torch's defaults and back to them: other tests may have left something."""
    flags = cudnn.deterministic, cudnn.benchmark
    torch_as_it_comes()
    yield
    torch_as_it_comes()
    cudnn.deterministic, cudnn.benchmark = flags


def strict_and_back() -> None:
    before = state()
    with strict_arithmetic():
        inside = state()
    assert {inside[name] for name in PARTS} == {"ieee"} and inside["flags"] == (True, False)
    assert not inside["old products"] and not inside["old"] and inside["precision"] == "highest"
    after = state()
    assert {key: after[key] for key, value in before.items() if value != UNTOLD} == {
        key: value for key, value in before.items() if value != UNTOLD}


@pytest.mark.parametrize("switch", [
    "", "backends.fp32_precision = 'tf32'", "cudnn.fp32_precision = 'ieee'",
    "backends.cuda.matmul.fp32_precision = 'tf32'", "cudnn.conv.fp32_precision = 'ieee'", "cudnn.allow_tf32 = False",
    "backends.cuda.matmul.allow_tf32 = True", "torch.set_float32_matmul_precision('medium')",
    "mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.set_float32_matmul_precision('high'); cudnn.conv.fp32_precision = 'ieee'"])
def test_evaluations_compute_plain_fp32_after_any_switch_and_give_it_back(switch: str) -> None:
    exec(switch)
    strict_and_back()


@pytest.mark.parametrize(("before", "precision", "products", "convolutions"), [
    ("", "fp32", "none", "tf32"), ("", "tf32", "tf32", "tf32"), ("", "ieee", "ieee", "ieee"),
    ("backends.fp32_precision = 'tf32'", "ieee", "ieee", "ieee")])
def test_the_precision_of_a_run_sets_what_its_description_says(before: str, precision: str, products: str,
                                                               convolutions: str) -> None:
    exec(before)
    prepare_torch(cohort_config("at", 1, step={"precision": precision}))
    found = state()
    assert (found["products"], found["convolutions"]) == (products, convolutions)
    assert found["old products"] == (products == "tf32") and found["old"] == (convolutions == "tf32")
    strict_and_back()


@pytest.mark.parametrize("switch", ["", "cudnn.conv.fp32_precision = 'ieee'", "backends.fp32_precision = 'tf32'"])
def test_an_attack_has_its_copy_whatever_the_switches(switch: str) -> None:
    exec(switch)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten())
    copied = AttackCopy(model, torch.rand(2, 2, 5, 5))
    copied.refresh(torch.rand(2, 2, 5, 5))
    assert copied.reason == "" and copied._called is not model
