"""Rules between settings. Each takes a complete configuration and returns what is wrong; `where` is a key."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mat_dist.config.presets import hears
from mat_dist.config.schema import Config, PeerConfig
from mat_dist.errors import ConfigError

Rule = Callable[[Config], list[ConfigError]]
_RULES: list[tuple[Rule, frozenset[str]]] = []


def rule(*sections: str) -> Callable[[Rule], Rule]:
    """Register a rule that reads `sections` ("peers" are names, streams and number)."""
    def register(function: Rule) -> Rule:
        _RULES.append((function, frozenset(sections)))
        return function
    return register


def check(config: Config, broken: frozenset[str] = frozenset()) -> list[ConfigError]:
    """All problems of all rules but those that read a section of which some values are unknown (`broken`)."""
    return [found for function, sections in _RULES if not sections & broken for found in function(config)]


def entries(config: Config) -> Iterator[tuple[str, PeerConfig]]:
    """Key and entry of every peer."""
    for index, peer in enumerate(config.peers):
        yield f"peers.{index}", peer


def heard_by(config: Config, index: int) -> list[int]:
    """The peers that a peer learns from."""
    me = config.peers[index]
    return [i for i, other in enumerate(config.peers) if i != index and hears(me.role, other.role, other.frozen)]
