"""PeerAiD (Jung et al., CVPR 2024), the weights of its code for CIFAR-10: a peer that learns the student's AEs, and the
student that learns from the peer, T 5; KL is averaged over the 10 classes there, hence a tenth of 0.1, 1 and 1. Two
things differ: there the peer guides the attack in eval mode, and its KL also moves the student."""

from __future__ import annotations

from mat_dist.config.methods import Method, Preset, register_method

register_method(Method("peeraid", "peer tutoring on the student's AEs (PeerAiD)", presets={"peeraid": Preset(
    ({"hard_weight": 1.0, "hard_own": 0.0, "kd_weight": 0.01, "kd_own": 0.0},
     {"hard_weight": 0.0, "kd_weight": 0.1, "kd_own": 1.0, "temperature": 5.0, "pair_kl": 0.1}),
    ({}, {"loss": "kl_teacher", "start": "gaussian"}))}))
