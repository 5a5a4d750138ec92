"""Versions of what a run stands on."""

from __future__ import annotations

import platform
from importlib import metadata

from mat_dist.errors import EnvironmentFault
from mat_dist.runs.record import versions
from mat_dist.tools.check.findings import Answer

OLDEST_TORCH = (2, 9)


def check_versions() -> Answer[bool]:
    """Python, torch, torchvision, numpy, pydantic, CUDA, NCCL. Raises EnvironmentFault where torch cannot be used."""
    found = {**{name: one for name, one in versions().items() if name != "system"},
             "pydantic": metadata.version("pydantic")}
    try:
        import torch
        import torchvision  # noqa: F401  (its compiled part must fit torch)
    except (ImportError, OSError, RuntimeError) as error:
        raise EnvironmentFault(f"torch or torchvision cannot be imported: {error}", _listed(found),
                               "install a torchvision that was made for this torch: pip install torch torchvision") \
            from error
    found["CUDA"] = str(torch.version.cuda or "none")
    if hasattr(torch._C, "_nccl_version"):  # not in builds for the CPU
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    numbers = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if numbers < OLDEST_TORCH:
        raise EnvironmentFault(f"torch {torch.__version__}", _listed(found), "install torch 2.9 or later")
    return Answer(True, f"{_listed(found)}, {platform.system()}", details={"versions": found})


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())
