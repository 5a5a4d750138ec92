"""Rules between settings. Each takes a complete configuration and returns what is wrong; `where` is a key."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mat_dist.config.methods import methods
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
    """All problems of all rules, those of methods too, but of rules that read a section of which some values are
    unknown (`broken`)."""
    rules = [*_RULES, *(one for method in methods().values() for one in method.rules)]
    return [found for function, sections in rules if not sections & broken for found in function(config)]


def entries(config: Config) -> Iterator[tuple[str, PeerConfig]]:
    """Key and entry of every peer."""
    for index, peer in enumerate(config.peers):
        yield f"peers.{index}", peer


def heard_by(config: Config, index: int) -> list[int]:
    """The peers that a peer learns from."""
    me = config.peers[index]
    return [i for i, other in enumerate(config.peers) if i != index and hears(me.role, other.role, other.frozen)]


def learns_alone(peer: PeerConfig) -> bool:
    """Whether its loss has terms on own AEs or clean images that need no teacher."""
    c = peer.loss
    pairs = c.pair_kl or c.pair_mse or any(methods()[name].pairs for name in peer.methods)
    return bool((c.hard_weight and c.hard_own) or c.clean_weight or pairs)


def asks_for_one_label(config: Config, asks: Callable[[PeerConfig], bool], where: str, use: str) -> list[ConfigError]:
    """The problem of settings that ask whether a prediction is right, with images that have two labels (CutMix)."""
    return [ConfigError(f"{where} (preset {peer.loss.preset}) asks for one label per image, and cutmix mixes two",
                        f"{key}.{where}", f"write data.augment.cutmix: 0, or {use}")
            for key, peer in entries(config) if config.data.augment.cutmix and asks(peer)]
