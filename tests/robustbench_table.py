"""Networks of RobustBench with random weights in the forms in which they are distributed, loaded as `init_from` does.

Shown is the largest difference of their logits to those of the original module, relative to the largest logit.

`python -m tests.robustbench_table [ENTRY ...]` prints the table of docs/models.md; it needs the package `robustbench`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.checkpoints.load import initialise
from mat_dist.config.schema import ModelConfig, PeerConfig, StepConfig
from mat_dist.errors import MatError
from mat_dist.models.registry import Images, make_model

MOMENTS = ("mu", "sigma", "mean", "std")
Form = Callable[[dict[str, Tensor]], Any]


def named(prefix: str) -> Form:
    return lambda state: {f"{prefix}{key}": value for key, value in state.items()}


def bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the normalisation, which many files do not have."""
    return {key: value for key, value in state.items() if key.rpartition(".")[2] not in MOMENTS}


def last_and_best(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"last": bare(state), "best": {key: value + 1 for key, value in bare(state).items()}}


FORMS: dict[str, Form] = {
    "plain": bare, "mu, sigma": lambda state: state, "module.": lambda state: named("module.")(bare(state)),
    "state_dict, module.": lambda state: {"state_dict": named("module.")(bare(state)), "epoch": 3, "optimizer": {}},
    "state_dict, model.": lambda state: {"state_dict": named("model.")(bare(state))},
    "best, last": last_and_best,
    "module.normalize., module.model.": named("module."),
    "safetensors": bare,
}
ROWS = (  # data set by its classes, threat/entry, form
    (10, "Linf/Andriushchenko2020Understanding", "best, last"), (10, "Linf/Wong2020Fast", "plain"),
    (10, "corruptions/Kireev2021Effectiveness_RLAT", "best, last"), (100, "Linf/Rice2020Overfitting", "plain"),
    (10, "Linf/Rebuffi2021Fixing_R18_ddpm", "plain"), (10, "Linf/Carmon2019Unlabeled", "state_dict, module."),
    (10, "Linf/Zhang2019Theoretically", "safetensors"), (10, "Linf/Hendrycks2019Using", "module."),
    (10, "Linf/Wang2023Better_WRN-28-10", "module."), (10, "Linf/Chen2020Efficient", "state_dict, model."),
    (100, "corruptions/Hendrycks2020AugMix_WRN", "state_dict, module."), (10, "Linf/Engstrom2019Robustness", "plain"),
    (10, "corruptions/Modas2021PRIMEResNet18", "mu, sigma"), (10, "Linf/Sehwag2021Proxy_R18", "safetensors"),
    (10, "corruptions/Diffenderfer2021Winning_LRR", "plain"),
    (1000, "Linf/Salman2020Do_R18", "module.normalize., module.model."),
    (1000, "Linf/Engstrom2019Robustness", "module.normalize., module.model."),
    (10, "Linf/Ding2020MMA", "plain"), (10, "Linf/Pang2020Boosting", "plain"),
    (10, "corruptions/Hendrycks2020AugMix_ResNeXt", "module."), (10, "Linf/Debenedetti2022Light_XCiT-S12", "plain"),
    (10, "Linf/Chen2020Adversarial", "plain"), (10, "Linf/Kang2021Stable", "plain"),
)


def original(classes: int, name: str, noise: bool = True) -> nn.Module:
    """The module of RobustBench with random weights and running statistics of its own."""
    import timm
    from robustbench.model_zoo import model_dicts

    threat, entry = name.split("/")
    data = {10: "cifar10", 100: "cifar100", 1000: "imagenet"}[classes]
    registered = f"{entry}_{data}_{threat}".lower().replace("-", "_")
    made = next(models for found, models in model_dicts.items() if found.value == data)
    models = next(models for found, models in made.items() if found.value == threat)
    with rng.keyed_rng(7):
        net = timm.create_model(registered) if timm.is_model(registered) else models[entry]["model"]()
        for key, value in net.state_dict().items() if noise else ():
            if value.is_floating_point() and key.rpartition(".")[2] not in MOMENTS:
                more = 0.1 * torch.randn_like(value) * (value.std() if value.ndim > 1 else 1)
                value += more.abs() if key.endswith("running_var") else more
        return net.eval()


def difference(classes: int, name: str, form: str, folder: Path, **model: Any) -> tuple[float, Any]:
    """Relative difference of the logits, and the notes of the loading. Raises MatError where it is refused."""
    theirs = original(classes, name)
    file = folder / ("a.safetensors" if form == "safetensors" else "a.pt")
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in FORMS[form](theirs.state_dict()).items()}, file)
    else:
        torch.save(FORMS[form](theirs.state_dict()), file)
    start = f"{file}:last" if form == "best, last" else str(file)
    entry = name.partition("/")[2]
    spec = PeerConfig(name="peer0", init_from=start, frozen=True, model=ModelConfig(
        **{"name": f"robustbench/{name}" if entry == "Rice2020Overfitting" else f"robustbench/{entry}", **model}))
    side = 224 if classes == 1000 else 32
    images = Images((3, side, side), classes, (0.3, 0.3, 0.3), (0.2, 0.2, 0.2))
    ours = make_model(spec, images, seed=0, step=StepConfig(), device=torch.device("cpu"))
    peer = Loaded(spec, ours)
    initialise([peer], images)
    x_BCHW = rng.uniform(3, (2, 3, side, side))
    with torch.no_grad():
        want_BK, found_BK = theirs(x_BCHW), ours.eval()(x_BCHW)
    return float((found_BK - want_BK).abs().max() / want_BK.abs().max()), peer.notes


class Loaded:
    """As much of a peer as the loading of weights needs."""

    def __init__(self, spec: PeerConfig, model: nn.Module) -> None:
        self.spec, self.model, self.index, self.notes, self.name = spec, model, 0, list[str](), "peer0"

    def start_from(self, weights: dict[str, Tensor]) -> None:
        self.model.load_state_dict(weights)

    def load(self, state: Any) -> None:
        raise NotImplementedError


def rows(only: list[str]) -> Iterator[str]:
    from mat_dist.models.robustbench import entries

    for classes, name, form in ROWS:
        entry = name.split("/")[1]
        known = entries(classes)
        built_in = known.get(name, known.get(entry))
        by = f"`{built_in[0]}`" if built_in else "package"
        if only and entry not in only:
            continue
        with TemporaryDirectory() as folder:
            try:
                result = f"{difference(classes, name, form, Path(folder))[0]:.1e}"
            except MatError as error:
                result = f"refused: {error.what}"
        yield f"| {name.replace('/', ' ')} | {classes} | {form} | {by} | {result} |"


def main() -> None:
    warnings.simplefilter("ignore")
    print(f"robustbench {version('robustbench')}, timm {version('timm')}, torch {version('torch')}\n\n"
          "| Entry | Classes | Form of the file | Network | Difference |\n|---|---|---|---|---|")
    for row in rows(sys.argv[1:]):
        print(row, flush=True)


if __name__ == "__main__":
    main()
