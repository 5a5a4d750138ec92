"""Learnable boundary guided adversarial training (LBGAT; Cui et al., ICCV 2021), beta 0: a net that learns clean images
and a robust one whose logits on AEs meet the other's on clean images. There one loss trains both; here each side of the
squared difference has its own copy of it, which gives the same gradients."""

from __future__ import annotations

from mat_dist.config.methods import Method, Preset, register_method

register_method(Method("lbgat", "learnable boundary guided adversarial training (LBGAT)", presets={"lbgat": Preset(
    ({"hard_weight": 0.0, "clean_weight": 1.0, "kd_clean": 1.0, "kd_loss": "mse", "teacher_input": "own_ae"},
     {"hard_weight": 0.0, "kd_weight": 1.0, "kd_own": 1.0, "kd_loss": "mse", "teacher_input": "clean"}),
    ({"loss": "kl_clean", "start": "gaussian"},))}))
