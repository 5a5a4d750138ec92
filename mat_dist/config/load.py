"""From YAML files and `key=value` settings to a checked, complete configuration.

Layers, lowest first: the files that `defaults` names, in order; the file; the command line. Mappings are merged
key by key, anything else is replaced. Then each peer's entry is laid over the shared sections model, threat,
union, attack, loss and optim. A layer (or a peer) that changes `loss.preset` starts from its own coefficients: those
that a lower layer gave for another preset are dropped.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from mat_dist.config import rules  # noqa: F401  it registers its rules
from mat_dist.config.describe import canonical, nearest, problem, settings
from mat_dist.config.nodes import SHARED, Node, cut, joined, locate, merge, normalise, plain, without
from mat_dist.config.overrides import apply_overrides, expand_peers, read_overrides, without_effect
from mat_dist.config.presets import fill_peer
from mat_dist.config.registry import check
from mat_dist.config.schema import Config
from mat_dist.errors import ConfigError

DEFAULT = "digits"
_MOST_FILES = 100  # a file may be named by several others, but not without end
_MOST_ERRORS = 100  # with more bad values than this the rules are not checked


def config_folders() -> list[Path]:
    """Where the configurations that belong to the project are: the repository, or an installed wheel's data folder."""
    package = Path(__file__).resolve().parents[1]
    share = Path("share", "mat_dist", "configs")
    user = sysconfig.get_path("data", sysconfig.get_preferred_scheme("user"))
    return [package.parent / "configs", Path(sys.prefix, share), package.parent / share, Path(user, share)]


def config_name(path: str | None) -> str:
    """The file's name without folder and `.yaml`, `digits` for None; fit to begin a run's name."""
    stem = os.path.basename(path or DEFAULT).removesuffix(".yaml").removesuffix(".yml")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:40] or "config"


def find_config(name: str, folders: Sequence[Path]) -> Path:
    """The file `name` or `name.yaml` in the first of `folders` that has it.

    Raises:
        ConfigError: there is none.
    """
    for folder in folders:
        for candidate in (name, f"{name}.yaml"):
            if os.path.isfile(folder / candidate):
                return folder / candidate
    known = sorted({path.stem for folder in config_folders() if folder.is_dir() for path in folder.glob("*.yaml")})
    near = nearest(os.path.basename(name).removesuffix(".yaml"), known)
    how = f"did you mean {near}?" if near else f"give the path of a YAML file or one of {', '.join(known)}"
    raise ConfigError("there is no such configuration file", ascii(name)[1:-1] or "no name", how)


def _display(path: Path) -> str:
    """The path for messages: relative where the file lies below the working directory."""
    absolute, here = os.path.abspath(path), os.getcwd() + os.sep
    return ascii(absolute.removeprefix(here))[1:-1]


class _Files:
    """Reads a file and those that its `defaults` name."""

    def __init__(self, problems: list[ConfigError]) -> None:
        self.problems, self.count = problems, 0

    def compose(self, path: Path, chain: tuple[str, ...] = ()) -> Node:
        """The merged tree of `path`; `chain` holds the files that led here, to find cycles."""
        from mat_dist.config.yaml_input import read  # PyYAML is loaded only where it is used

        source, real = _display(path), os.path.realpath(path)
        self.count += 1
        if real in chain:
            names = " -> ".join(os.path.basename(p) for p in (*chain[chain.index(real):], real))
            raise ConfigError(f"files that name each other: {names}", f"{source}, defaults", "remove one of the names")
        if self.count > _MOST_FILES:
            raise ConfigError(f"more than {_MOST_FILES} files", f"{source}, defaults", "name each file once")
        tree = read(str(path), source, self.problems)
        below = None
        for name in self._bases(tree.get("defaults")):
            try:
                base = find_config(name, [path.parent, *config_folders()])
            except ConfigError as missing:
                what = f"{missing.what}: {missing.where}"
                self.problems.append(ConfigError(what, f"{source}, defaults", missing.how))
                continue
            below = merge(below, self.compose(base, (*chain, real)))
        own = normalise(without(tree, "defaults"), self.problems)
        return merge(below, own) or own

    def _bases(self, node: Node | None) -> list[str]:
        names = [] if node is None or node.value is None else plain(node)
        names = [names] if isinstance(names, str) else names
        if node is not None and not (isinstance(names, list) and all(isinstance(n, str) and n for n in names)):
            self.problems.append(ConfigError("defaults is not a list of files", node.where, "write defaults: [base]"))
            return []
        return names


def _shorten(path: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The path of the setting that holds an item of a list."""
    return path[:-1] if canonical(path[:-1]) in settings() else path


def _validate(tree: Node, problems: list[ConfigError]) -> tuple[Node, frozenset[str]]:
    """Check every value by itself. Returns the tree without the bad ones, and the sections that had some."""
    try:
        Config.model_validate(plain(tree))
        return tree, frozenset()
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
    problems += [problem(found, tree, count) for count, found in enumerate(errors)]
    if len(errors) > _MOST_ERRORS:
        raise joined(problems, tree.source)
    for found in errors:
        tree = cut(tree, _shorten(found["loc"]))
    return expand_peers(tree, tree.source), frozenset(canonical(found["loc"]).split(".")[0] for found in errors)


def _under_peers(tree: Node) -> Node:
    """`tree` with complete peers: each entry laid over the shared sections, which are then left out."""
    shared = {name: tree.get(name) for name in SHARED}
    entries = []
    for entry in tree.value["peers"].value:
        sections = dict(entry.value)
        for name in SHARED:
            if (section := merge(shared[name], entry.get(name), name)) is not None:
                sections[name] = section
        entries.append(replace(entry, value=sections))
    top = {name: child for name, child in tree.value.items() if name not in SHARED}
    return replace(tree, value={**top, "peers": replace(tree.value["peers"], value=tuple(entries))})


def resolve(tree: Node) -> Config:
    """The configuration of a checked tree whose peers are complete; presets and defaults filled in."""
    config = Config.model_validate(plain(tree))
    peers = tuple(fill_peer(peer, index, len(config.peers)) for index, peer in enumerate(config.peers))
    return config.model_copy(update={"peers": peers})


def _placed(found: ConfigError, tree: Node, source: str) -> ConfigError:
    """A rule's problem (its `where` is a key) with the file and line that gave the value."""
    path = found.where.split(".")
    node, depth = locate(tree, path)
    if depth == len(path):
        return ConfigError(found.what, node.where, found.how)
    key = ".".join(path[2:]) if path[0] == "peers" and len(path) > 2 and path[2] in SHARED else found.where
    return ConfigError(found.what, f"{source}, {key}", found.how)


def load_config(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """The complete configuration of a run.

    `peers` of the result holds complete entries: name, stream, loss and attack are filled in. The shared sections
    have done their work and are back at their defaults; read `config.peers` only.

    Args:
        path: a YAML file, or the name of one in the project's `configs`; None: `digits`.
        overrides: `key=value`, the value in YAML; keys with dots and list indices. `peers.all.x` is every peer.

    Raises:
        ConfigError: `problems` has everything that is wrong, each with the file, line and key.
    """
    problems: list[ConfigError] = []
    folders = config_folders() if path is None else [Path(), *config_folders()]
    file = find_config(DEFAULT if path is None else path, folders)
    source = _display(file)
    changes = read_overrides(overrides, problems)
    try:
        tree = _Files(problems).compose(file)
    except ConfigError as unreadable:
        raise joined([*problems, unreadable], source) from None
    tree = expand_peers(apply_overrides(tree, changes, source, problems), source)
    tree, broken = _validate(tree, problems)
    complete = _under_peers(tree)
    sound = [change for change in changes if change.path[0] not in broken]
    problems += without_effect(sound, complete.value["peers"].value, source)
    config = resolve(complete)
    problems += [_placed(found, complete, source) for found in check(config, broken)]
    if problems:
        raise joined(problems, source)
    return config
