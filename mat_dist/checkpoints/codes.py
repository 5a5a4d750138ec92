"""What published codes call the layers of our residual networks, whose modules have numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

_NORMS = {"norm1": "bn1", "norm2": "bn2", "norm3": "bn3"}
_BLOCK = re.compile(r"1\.(\d+)\.conv1\.weight")

_DEEPMIND = "DeepMind's networks (Gowal et al., 2020): SiLU, padding on two sides before strides of 2"


@dataclass(frozen=True)
class Code:
    """One published code."""

    text: str  # what it is, and what its names tell of the function that it computes
    block: str  # its name of a block, with {stage} from 1, {group} from 0 and the number {n} in it
    layers: Mapping[str, str]  # name in our network, or in a block of it -> name there; all others are equal
    same: bool = False  # padding behind alone where the stride is 2

    def names(self, expected: Mapping[str, Tensor]) -> dict[str, str]:
        """Our names -> those of this code; empty for a network without residual blocks of ours."""
        widths = [value.shape[0] for key, value in expected.items() if _BLOCK.fullmatch(key)]
        found, blocks, stage, n = dict[str, str](), list[str](), 0, 0
        for index, width in enumerate(widths):
            stage, n = (stage, n + 1) if index and width == widths[index - 1] else (stage + 1, 0)
            blocks.append(self.block.format(stage=stage, group=stage - 1, n=n) + ".")
        for key in expected if blocks else ():
            block = re.match(r"1\.(\d+)\.", key)
            layer, _, kind = key[block.end() if block else 0:].rpartition(".")
            place = blocks[int(block[1])] if block and int(block[1]) < len(blocks) else ""
            found[key] = f"{place}{self.layers.get(layer, layer)}.{kind}"
        return found


CODES = (
    Code("the Wide ResNet of TRADES: ReLU, eps 1e-05, shortcuts behind the first activation", "block{stage}.layer.{n}",
         {"0": "conv1", "2.0": "bn1", "4": "fc", **_NORMS, "shortcut": "convShortcut"}),
    Code(_DEEPMIND,
         "layer.{group}.block.{n}", {"0": "init_conv", "2.0": "batchnorm", "4": "logits", "norm1": "batchnorm_0",
                                     "norm2": "batchnorm_1", "conv1": "conv_0", "conv2": "conv_1"}, same=True),
    Code(_DEEPMIND,
         "layer_{group}.{n}", {"0": "conv_2d", "2.0": "batchnorm", "4": "logits", "norm1": "batchnorm_0",
                               "norm2": "batchnorm_1", "conv1": "conv_2d_1", "conv2": "conv_2d_2",
                               "shortcut.1": "shortcut"}, same=True),
    Code("the ResNets of pytorch-cifar: ReLU, eps 1e-05; of the pre-activation form there are copies whose shortcuts "
         "start before the first activation (model=preact_resnet18+early), which no file tells", "layer{stage}.{n}",
         {"0": "conv1", "0.0": "conv1", "0.1": "bn1", "2.0": "bn", "3": "linear", "4": "linear", **_NORMS,
          "shortcut": "shortcut.0"}),
    Code("torchvision's ResNets", "layer{stage}.{n}", {
        "0.0": "conv1", "0.1": "bn1", "3": "fc", **_NORMS, "shortcut.0": "downsample.0", "shortcut.1": "downsample.1"}),
)
