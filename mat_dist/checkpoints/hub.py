"""Weights of a repository on the Hugging Face hub: `hf:ORG/NAME`, `hf:ORG/NAME@REVISION/FILE`.

A file that has been fetched stays in the library's cache, which is all that a machine without network has.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mat_dist.errors import CheckpointError, ConfigError, EnvironmentFault, MatError, optional

HUB = "hf:"
_ADDRESS = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/([^:]+))?(?::(.+))?")
_KNOWN = ("model.safetensors", "pytorch_model.bin")  # of the libraries that write there
_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")


def fetched(address: str) -> tuple[Path, str | None]:
    """The file in the cache, fetched if need be, and the entry in it that is meant.

    Raises ConfigError for an address that is none, EnvironmentFault where it can be neither fetched nor found, and
    CheckpointError where the repository does not have it.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError("this is no address on the hub", f"init_from={address[:200]}",
                          "write hf:ORG/NAME or hf:ORG/NAME@REVISION/FILE, and :ENTRY behind it for one of several "
                          "networks in a file")
    repository, revision, file, entry = match.groups()
    hub, cache = (optional(module, address, "pip install huggingface_hub, or give the path of a file")
                  for module in ("huggingface_hub", "huggingface_hub.constants"))
    try:
        return _file(hub, address, repository, revision, file), entry
    except MatError:
        raise
    except Exception as error:  # no network, an unfinished cache, a full disk; the library raises any type
        if getattr(error, "response", None) is not None:  # the hub answered
            raise CheckpointError(f"the hub refuses it: {' '.join(str(error).split())[:200]}", address,
                                  "check name and revision; log in with hf auth login where it is private") from error
        folder = f"models--{repository.replace('/', '--')}"
        raise EnvironmentFault(f"it is not in the cache, and the hub cannot be reached ({type(error).__name__})",
                               address, f"run hf download {repository} on a machine with network, and copy its folder "
                               f"{folder} to {cache.HF_HUB_CACHE} here (HF_HUB_CACHE)") from error


def _file(hub: Any, address: str, repository: str, revision: str | None, file: str | None) -> Path:
    """The file in the cache; where nothing else is said, the one file of weights of the repository, or of the cache."""
    local = False
    try:
        files = [one.rfilename for one in hub.HfApi().model_info(repository, revision=revision, timeout=10).siblings]
    except Exception as error:  # no network, or HF_HUB_OFFLINE; the library raises what those below it raise
        if getattr(error, "response", None) is not None:
            raise
        local, folder = True, Path(hub.snapshot_download(repository, revision=revision, local_files_only=True))
        files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    weights = [name for name in files if name.endswith(_ENDINGS)]
    found = [file] if file else next(([name] for name in _KNOWN if name in weights), weights)
    if len(found) != 1 or found[0] not in files:
        where = "its folder in the cache" if local else "the repository"
        raise CheckpointError(f"{where} has {f'no file {file}' if file else f'{len(found)} files of weights'}; there "
                              f"are {', '.join(files[:8])}", address, f"write hf:{repository}/FILE with one of them")
    return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=found[0],
                                      local_files_only=local)) / found[0]
