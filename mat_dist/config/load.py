"""From YAML files and `key=value` settings to a checked, complete configuration, back to YAML, and differences of two.

Layers, lowest first: the files that `defaults` names, in order; the file; the command line. Mappings are merged
key by key, anything else is replaced. Then each peer's entry is laid over the sections that it shares with the top
level. A layer (or a peer) that changes `loss.preset` starts from its own coefficients: those that a lower layer gave
for another preset are dropped.
"""

from __future__ import annotations

import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from pydantic import ValidationError

from mat_dist.config import rules  # noqa: F401  it registers its rules
from mat_dist.config.fields import Section, parse_number, parse_threats
from mat_dist.config.gone import VERSION, lost, unused
from mat_dist.config.help import canonical, faulty, general, problem, settings
from mat_dist.config.plugins import module_name
from mat_dist.config.presets import fill_peer
from mat_dist.config.rules import check
from mat_dist.config.schema import MAX_PEERS, Config, PeerConfig
from mat_dist.config.tree import (
    COMMAND_LINE,
    SHARED,
    Node,
    Path,
    Tree,
    both_names,
    can_be_empty,
    cut,
    entries,
    joined,
    layer_of,
    locate,
    normalised,
    over,
    parse,
    plain,
    printable,
    read,
    section_class,
    with_entries,
    write,
)
from mat_dist.errors import CheckpointError, ConfigError, nearest

DEFAULT = "digits"
PRETRAINED = "pretrained"  # init_from: what the network's library publishes; before a source: with a new last layer
_MOST_FILES = 100  # a file may be named by several others, but not without end
_MOST_ERRORS = 100  # so many bad values are told; with more the rules are not checked
_KEY = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*", re.ASCII)
_FIRST = (("loss", "preset"), ("threat", "norm"), ("attack", "norm"))
ALL = "all"  # peers.all.x: the same for every peer
_HOW = "write key=value with a key such as train.epochs or peers.2.model (--help lists all)"


def config_folders() -> list[File]:
    """Where the configurations that belong to the project are: the repository, or an installed wheel's data folder."""
    package = File(__file__).resolve().parents[1]
    share = File("share", "mat_dist", "configs")
    user = sysconfig.get_path("data", sysconfig.get_preferred_scheme("user"))
    return [package.parent / "configs", File(sys.prefix, share), package.parent / share, File(user, share)]


def _of_a_run(tree: Tree, source: str) -> Tree:
    """The settings of a run without those of an older version that changed nothing. Raises CheckpointError for a run
    that was trained with settings that went."""
    went = [f"{node.key}={node.value}" for path, node in tree.items() if lost(general(path), node.value)]
    if went:
        raise CheckpointError(f"version {VERSION} no longer has settings of this run: {', '.join(went[:8])}", source,
                              "use version 0.1 of mat_dist for it")
    return {path: node for path, node in tree.items() if not unused(general(path), node.value)}


def require_plugins(file: File) -> None:
    """Raises ConfigError where this process has not loaded the plug-ins of the run in whose folder the file lies."""
    try:
        told = json.loads((file.parent / "environment.json").read_text(encoding="utf-8"))["placement"]["plugins"]
        lacking = [printable(path) for path, digest in told.items() if module_name(digest) not in sys.modules]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if lacking:
        raise ConfigError(f"the run needs its plug-ins: {', '.join(lacking)}", _display(file),
                          "give --plugin FILE for each; in Python, mat_dist.config.load_plugins([FILE]) first")


def config_name(path: str | None, config: Config | None = None) -> str:
    """The file's name without folder and `.yaml`, `digits` for None; fit to begin a run's name.

    Args:
        config: what was made of the file: other data than the file's own have their name in it too, or without a file
            alone.
    """
    stem = os.path.basename(path or DEFAULT).removesuffix(".yaml").removesuffix(".yml")
    if config is not None:
        made, own = _data_name(*_made_for(path)), _data_name(config.data.name, config.data.root)
        stem = stem if made in (None, own) else own if path is None else f"{stem}-{own}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:40] or "config"


def _data_name(name: Any, root: Any) -> Any:
    """What images of the user's own are called: as their folder or file."""
    return os.path.basename(root.rstrip("/")).removesuffix(".npz") if name in ("folder", "npz") and root else name


def _made_for(path: str | None) -> tuple[Any, Any]:
    """Name and root of the data that a file gives itself."""
    top = _composed(_file(path), [])
    name, root = (locate(top, ("data", key)) for key in ("name", "root"))
    return name[0].value if name[1] == 2 else None, root[0].value if root[1] == 2 else None


def recipe_notes(path: str | None, config: Config) -> list[str]:
    """That the settings were made for other data, where they were; one line."""
    made, stem = _made_for(path)[0], os.path.basename(path or f"{DEFAULT}.yaml")
    if made in (None, config.data.name, "folder"):  # a recipe for a folder is one for any images of one's own
        return []
    return [f"the recipe is that of {stem}{'' if path else ' (no --config)'}, made for {made}, and the data are "
            f"{config.data.name}: its peers, rate, batch and radius may not fit; --config own_images is for own images"]


def find_config(name: str, folders: Sequence[File]) -> File:
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


def _file(path: str | None) -> File:
    """The file that a user names, also one of the project's; without a name the default."""
    return find_config(DEFAULT, config_folders()) if path is None else find_config(path, [File(), *config_folders()])


def _display(path: File) -> str:
    """The path for messages: relative where the file lies below the working directory."""
    absolute, here = os.path.abspath(path), os.getcwd() + os.sep
    return ascii(absolute.removeprefix(here))[1:-1]


def _composed(path: File, problems: list[ConfigError], chain: tuple[str, ...] = (), seen: list[str] | None = None
              ) -> Tree:
    """The merged settings of a file and of those that its `defaults` name; `chain` holds the files that led here, to
    find cycles, `seen` all of them."""
    source, real, seen = _display(path), os.path.realpath(path), [] if seen is None else seen
    seen.append(real)
    if real in chain:
        names = " -> ".join(os.path.basename(p) for p in (*chain[chain.index(real):], real))
        raise ConfigError(f"files that name each other: {names}", f"{source}, defaults", "remove one of the names")
    if len(seen) > _MOST_FILES:
        raise ConfigError(f"more than {_MOST_FILES} files", f"{source}, defaults", "name each file once")
    tree = read(str(path), source, problems)
    if path.name == "config.yaml" and (path.parent / "environment.json").is_file():
        tree = _of_a_run(tree, source)
    own = {path: node for path, node in tree.items() if path[0] != "defaults"}
    below: Tree = {}
    for name in _bases({path: node for path, node in tree.items() if path not in own}, problems):
        try:
            base = find_config(name, [path.parent, *config_folders()])
        except ConfigError as missing:
            problems.append(ConfigError(f"{missing.what}: {missing.where}", f"{source}, defaults", missing.how))
            continue
        below = over(below, _composed(base, problems, (*chain, real), seen))
    return over(below, layer_of(own, problems))


def _bases(given: Tree, problems: list[ConfigError]) -> list[str]:
    node = given.get(("defaults",))
    names = [] if node is None or node.value is None else node.value
    names = [names] if isinstance(names, str) else names
    if (given and node is None) or not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        problems.append(ConfigError("defaults is not a list of files", next(iter(given.values())).where,
                                    "write defaults: [base]"))
        return []
    return names


@dataclass(frozen=True)
class Override:
    """One `key=value`, its key cut at the dots and its value read."""

    path: tuple[str, ...]
    value: Tree  # below `path`

    @property
    def key(self) -> str:
        """As it was written."""
        return ".".join(self.path)

    @property
    def tree(self) -> Tree:
        """As in a file."""
        return {(*self.path, *inner): node for inner, node in self.value.items()}

    @property
    def empty(self) -> bool:
        """Whether it is `null`."""
        return () in self.value and self.value[()].value is None

    @property
    def rank(self) -> int:
        """Order of application: the number of peers, then presets and norms, then what builds on them."""
        if self.path == ("peers",):
            return 0
        return 1 if self.path[-1] in ("loss", "threat") or self.path[-2:] in _FIRST else 2


def _read(item: str, problems: list[ConfigError]) -> Override:
    """`key=value` as an Override. Raises ConfigError; what else is wrong with it goes to `problems`."""
    key, equals, text = item.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise ConfigError(f"{printable(item)} is not a setting", COMMAND_LINE, _HOW)
    if not text.strip():
        raise ConfigError(f"{key} has no value", COMMAND_LINE, f"write {key}=VALUE; null empties a setting")
    path = tuple(key.split("."))
    if path[0] == "defaults":
        raise ConfigError("defaults is for files", f"{COMMAND_LINE}, {key}", "write --config FILE")
    setting = settings().get(canonical(path))
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if setting is not None and setting.kind == "text" and text != "null" and not quoted:
        return Override(path, {(): Node(text, COMMAND_LINE, key)})  # run.name=007 is a name, not a number
    found: list[ConfigError] = []
    value = parse(text, COMMAND_LINE, found, key, numbered=False)
    if found:
        problems += found[1:]
        raise found[0]
    return Override(path, value)


def setting_words(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A program's settings as `key=value`: sections may be nested, keys may have dots, text is as on the command line;
    numbers and lists of numpy and torch, paths and fractions are read too."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from setting_words(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}=" + (value if isinstance(value, str) else json.dumps(
                value, default=lambda one: one.tolist() if hasattr(one, "tolist") else str(one)))


@contextmanager
def of_a_call() -> Iterator[None]:
    """Mistakes in `setting_words` are said to stand among the arguments of a call, not on a command line."""
    try:
        yield
    except ConfigError as error:
        for one in {error, *error.problems}:
            one.where, one.how = (text.replace(COMMAND_LINE, "arguments") for text in (one.where, one.how))
            one.args = (f"{one.what} ({one.where}): {one.how}",)
        raise


def read_overrides(items: Sequence[str], problems: list[ConfigError]) -> list[Override]:
    """The overrides that can be read, in the order of application; what is wrong with the others goes to `problems`."""
    found = []
    for item in items:
        try:
            found.append(_read(item, problems))
        except ConfigError as refused:
            problems.append(refused)
    found.sort(key=lambda override: override.rank)
    given = {one.path: one for one in found}
    for one in found:
        other, name = (key.split(".") for key in (general(one.path), canonical(one.path)))
        twin = given.get((*one.path[:-len(other)], *name))
        if other != name and twin is not None:
            problems.append(both_names(*(Node(None, COMMAND_LINE, each.key) for each in (one, twin))))
    return found


def _expanded(tree: Tree) -> Tree:
    """`tree` with `peers` as a list: a number becomes that many empty entries, none at all the default number."""
    given, there = locate(tree, ("peers",))
    number = given.value if there else len(Config.model_fields["peers"].default)
    if isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= MAX_PEERS:
        return with_entries(cut(tree, ("peers",)), [{}] * number)
    return tree


def _apply(tree: Tree, override: Override, problems: list[ConfigError]) -> Tree:
    """`tree` with an override. Raises ConfigError."""
    path = override.path
    if path == ("peers",):
        return cut(tree, path) if override.empty else over(tree, layer_of(override.tree, problems))
    if path[0] != "peers":
        return _laid(tree, path, override, Config, problems)
    tree = _expanded(tree)
    peers, which = entries(tree), path[1]
    if not peers:
        return tree  # what is wrong with `peers` itself is reported when it is validated
    if which != ALL and not (which.isdecimal() and int(which) < len(peers)):
        enough = f"; more peers: peers={int(which) + 1}" if which.isdecimal() and int(which) < MAX_PEERS else ""
        raise ConfigError(f"there is no peer {which}", f"{COMMAND_LINE}, {override.key}",
                          f"the peers are 0 to {len(peers) - 1}, or {ALL}{enough}")
    return with_entries(tree, [_laid(peer, path[2:], override, PeerConfig, problems) if which in (ALL, str(index)) else
                               peer for index, peer in enumerate(peers)])


def _laid(tree: Tree, path: Path, override: Override, model: type[Section], problems: list[ConfigError]) -> Tree:
    """The top level or a peer with an override at `path`."""
    if override.empty and can_be_empty(model, path):
        return cut(tree, path)
    given = normalised({(*path, *inner): node for inner, node in override.value.items()}, problems, model)
    around = {one[:depth] for one in given for depth in range(1, len(one)) if section_class(model, one[:depth])}
    # What stands in the place of a section is refused when it is validated, and not lost below what comes later.
    return tree if any(tree[one].value not in (None, {}) for one in around & tree.keys()) else over(tree, given)


def without_effect(overrides: Sequence[Override], peers: Sequence[Tree], source: str) -> list[ConfigError]:
    """Overrides of shared sections that no peer takes over, since each has an own value (as in a resolved file), or a
    union in place of its threat."""
    found = []
    for override in overrides:
        given = normalised(override.tree, [], Config)
        if override.path[0] not in SHARED or override.empty:
            continue
        free = [peer for peer in peers if _heeds(peer, given)]
        used = any(node.source == COMMAND_LINE and depth == len(path) for path in given for peer in free
                   for node, depth in [locate(peer, path)])
        if given and not free:
            found.append(ConfigError(f"{override.key} has no effect beside union.threats", f"{COMMAND_LINE}; {source}",
                                     "write union.threats=..., or a configuration without a union"))
        elif given and not used:
            found.append(ConfigError(f"{override.key} has no effect: each peer sets its own",
                                     f"{COMMAND_LINE}; {source}",
                                     f"write peers.{ALL}.{override.key}=... or peers.0.{override.key}=..."))
    return found


def _heeds(peer: Tree, given: Tree) -> bool:
    """Whether the threat in `given` can be that of a peer: the first one of its union takes its place. A radius that is
    the same is let through, because the settings of a study are given to all of its rows."""
    threats, eps = locate(peer, ("union", "threats"))[0].value, given.get(("threat", "eps"))
    if not threats or not given.keys() & {("threat", "norm"), ("threat", "eps")}:
        return True
    try:
        return ("threat", "norm") not in given and eps is not None and (
            float(parse_number(eps.value)) == parse_threats(threats)[0][1])
    except (ValueError, TypeError, AttributeError):
        return True  # what cannot be read is refused by itself


def _validated(tree: Tree, source: str, problems: list[ConfigError]) -> tuple[Tree, frozenset[str]]:
    """Check every value by itself. Returns the settings without the bad ones, and the sections that had some."""
    try:
        Config.model_validate(plain(tree))
        return tree, frozenset()
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
    inside = {other["loc"][:1] for other in errors if len(other["loc"]) > 1}
    # To pydantic a list is too short where all of its entries are bad.
    errors = [found for found in errors if found["type"] != "too_short" or found["loc"] not in inside]
    problems += [problem(found, tree) for found in errors[:_MOST_ERRORS]]
    if len(errors) > _MOST_ERRORS:
        raise joined(problems, source)
    for found in errors:
        tree = cut(tree, faulty(found))
    return _expanded(tree), frozenset(canonical(found["loc"]).split(".")[0] for found in errors)


def _under_peers(tree: Tree) -> Tree:
    """`tree` with complete peers: each entry laid over the shared sections, which are then left out."""
    shared = {path: node for path, node in tree.items() if path[0] in SHARED}
    return with_entries({path: node for path, node in tree.items() if path not in shared},
                        [over(shared, entry) for entry in entries(tree)])


def _resolved(tree: Tree) -> Config:
    """The configuration of checked settings whose peers are complete; presets and defaults filled in."""
    config = Config.model_validate(plain(tree))
    peers = tuple(fill_peer(peer, index, len(config.peers), config.data.name)
                  for index, peer in enumerate(config.peers))
    return config.model_copy(update={"peers": peers})


def _placed(found: ConfigError, tree: Tree, source: str) -> ConfigError:
    """A rule's problem (its `where` is a key) with the file and line that gave the value."""
    path = tuple(int(part) if part.isdecimal() else part for part in found.where.split("."))
    node, depth = locate(tree, path)
    if depth == len(path):
        return ConfigError(found.what, node.where, found.how)
    key = found.where if path[2:3] and path[2] not in SHARED else general(path)
    return ConfigError(found.what, f"{source}, {key}", found.how)


def load_config(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """The complete configuration of a run.

    `peers` of the result holds complete entries: name, stream, loss and attack are filled in. The shared sections
    have done their work and are back at their defaults; read `config.peers` only.

    Args:
        path: a YAML file, or the name of one in the project's `configs`; None: `digits`.
        overrides: `key=value`, the value in YAML; keys with dots. `peers.2.x` is one peer, `peers.all.x` every peer.

    Raises:
        ConfigError: `problems` has everything that is wrong, each with the file, line and key.
        CheckpointError: the file is that of a run which an older version trained with settings that went.
    """
    problems: list[ConfigError] = []
    file = _file(path)
    source = _display(file)
    changes = read_overrides(overrides, problems)
    try:
        tree = _composed(file, problems)
    except ConfigError as unreadable:
        raise joined([*problems, unreadable], source) from None
    for change in changes:
        try:
            tree = _apply(tree, change, problems)
        except ConfigError as refused:
            problems.append(refused)
    tree, broken = _validated(_expanded(tree), source, problems)
    tree = _under_peers(tree)
    # What it sets may stand in another section: attack.eps is threat.eps.
    sound = [one for one in changes if not broken & {path[0] for path in normalised(one.tree, [], Config)}]
    problems += without_effect(sound, entries(tree), source)
    config = _resolved(tree)
    problems += [_placed(found, tree, source) for found in check(config, broken)]
    if problems:
        require_plugins(file)  # what they register is unknown: all else follows from that
        raise joined(problems, source)
    return config


# ---------------------------------------------------------------- out again, and compared

# What a resumed run may change: none of it alters the weights that the training gives. `run.threads` and
# `step.memory` keep the result but for rounding; the data are compared by digest, so their paths may change.
NO_EFFECT = ("log.", "checkpoint.", "comm.", "run.root", "run.name", "run.resume", "run.threads", "data.root",
             "data.download", "data.cache", "data.residency", "step.memory", "step.engine")  # on what is trained
_MAY_CHANGE = ("eval.", *NO_EFFECT)
_LENGTH = ("train.epochs", "train.max_steps")


def _values(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """Plain values without the shared sections, which have no meaning in a resolved configuration."""
    values = config.model_dump(mode="json") if isinstance(config, Config) else dict(config)
    return {name: value for name, value in values.items() if name not in SHARED}


def dump_config(config: Config, *, with_name: bool = False) -> str:
    """The resolved configuration as YAML; `load_config` of it gives an equal one (all floats exact).

    The shared sections are left out, since each peer is complete, and so is `run.name`, so that running the
    file again begins a new run; `with_name` keeps it.
    """
    values = _values(config)
    if not with_name:
        values["run"].pop("name")
    return write(values)


def with_absolute_paths(config: Config) -> Config:
    """The same with absolute paths of the data and of the weights that peers start from; addresses as they are."""
    def absolute(path: str | None) -> str | None:
        return path if path is None or "://" in path else os.path.abspath(os.path.expanduser(path))

    def start(source: str | None) -> str | None:
        word, _, rest = (source or "").partition(":")
        if source == PRETRAINED or word == "hf":
            return source
        return f"{PRETRAINED}:{start(rest)}" if word == PRETRAINED else absolute(source)

    data = {name: absolute(getattr(config.data, name)) for name in ("root", "cache", "generated")}
    peers = tuple(spec.model_copy(update={"init_from": start(spec.init_from)}) for spec in config.peers)
    return config.model_copy(update={"data": config.data.model_copy(update=data), "peers": peers})


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        children: Any = value.items()
    elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        children = enumerate(value)
    else:
        yield key, list(value) if isinstance(value, tuple) else value
        return
    for name, child in children:
        yield from flat(child, f"{key}.{name}" if key else str(name))


def _complete(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """`_values`; settings that an older version did not know get their defaults."""
    values = _values(config)
    try:
        return _values(with_absolute_paths(Config.model_validate(values)))
    except ValidationError:  # written by a version with other settings: compared as it is
        return values


def _pairs(old: Config | Mapping[str, Any], new: Config | Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    values = [_complete(old), _complete(new)]
    numbers = [len(one["peers"]) for one in values if isinstance(one.get("peers"), (list, tuple))]
    if len(numbers) == 2 and len(set(numbers)) == 2:  # what else differs follows from that, or says nothing
        values = [{**one, "peers": number} for one, number in zip(values, numbers, strict=True)]
    before, after = (dict(flat(one)) for one in values)
    keys = [*after, *(key for key in before if key not in after)]
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _line(key: str, before: Any, after: Any) -> str:
    return f"{key}: {'null' if before is None else before} -> {'null' if after is None else after}"


def config_differences(old: Config | Mapping[str, Any], new: Config | Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for each setting that differs. A configuration may be given as its dumped values."""
    return [_line(*pair) for pair in _pairs(old, new)]


def flat_settings(config: Config) -> dict[str, Any]:
    """The settings of a complete configuration by their keys, with absolute paths."""
    return dict(flat(_values(with_absolute_paths(config))))


def binding(config: Config) -> dict[str, Any]:
    """The settings that a run keeps to its end, by their keys."""
    return {key: value for key, value in flat_settings(config).items() if not key.startswith((*_MAY_CHANGE, *_LENGTH))}


def resume_conflicts(old: Config | Mapping[str, Any], new: Config) -> list[str]:
    """The differences that a resumed run must refuse: all but `_MAY_CHANGE` and a longer training."""
    return [_line(*pair) for pair in _pairs(old, new)
            if not _longer(*pair) and not pair[0].startswith(_MAY_CHANGE)]


def trains_longer(old: Config, new: Config) -> bool:
    """Whether `new` has more epochs, or its training is cut later."""
    return any(_longer(*pair) for pair in _pairs(old, new))


def _longer(key: str, before: Any, after: Any) -> bool:
    if not isinstance(before, int) or key not in _LENGTH:
        return False
    return after > before if isinstance(after, int) else key == "train.max_steps"
