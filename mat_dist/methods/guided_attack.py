"""Attacks that move away from what teachers think of the clean image: the inner problem of RSLAD (Zi et al., ICCV 2021)
and PeerAiD (Jung et al., CVPR 2024). The core tells the attack the mean of its teachers' predictions."""

from __future__ import annotations

from mat_dist.config.methods import Method, register_method
from mat_dist.config.rules import heard_by
from mat_dist.config.schema import Config
from mat_dist.errors import ConfigError


def somebody_guides(config: Config) -> list[ConfigError]:
    """The attack needs somebody to learn from."""
    return [ConfigError("the attack loss kl_teacher needs a teacher, and there is no peer that this one learns from",
                        f"peers.{index}.attack.loss", "write attack.loss: ce or kl_clean, or add a peer")
            for index, peer in enumerate(config.peers)
            if peer.attack.loss == "kl_teacher" and not peer.frozen and not heard_by(config, index)]


register_method(Method("guided_attack", "attacks guided by teachers (RSLAD, PeerAiD)", guided=True,
                       attack_losses={"kl_teacher": "KL to the teachers' clean prediction (RSLAD)"},
                       rules=((somebody_guides, frozenset({"attack", "peers"})),)))
