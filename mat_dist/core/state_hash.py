"""A hash of a peer's whole state, to tell whether two are equal bit by bit."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


def state_hash(state: Any) -> str:
    """SHA-256 over the tensors and numbers of a nested state, with their keys."""
    digest = hashlib.sha256()

    def feed(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for k in value:
                feed(f"{path}.{k}", value[k])
        elif isinstance(value, (list, tuple)):
            for n, item in enumerate(value):
                feed(f"{path}.{n}", item)
        elif isinstance(value, Tensor):
            digest.update(f"{path} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{path} {value!r}".encode())

    feed("", state)
    return digest.hexdigest()
