"""Robust distillation from a frozen teacher: ARD and RSLAD. KL is averaged over the 10 classes in both codes, hence
weights of a tenth."""

from __future__ import annotations

from mat_dist.config.methods import Method, Preset, register_method

TEACHER_ATTACK = {"loss": "kl_teacher", "start": "gaussian"}

register_method(Method("distillation", "robust distillation from a frozen teacher (ARD, RSLAD)", presets={
    # Adversarially robust distillation (Goldblum et al., AAAI 2020), its code: T 30, alpha 1, which leaves no hard
    # labels.
    "ard": Preset(({"hard_weight": 0.0, "kd_weight": 0.1, "kd_own": 1.0, "temperature": 30.0, "teacher_input": "clean",
                    "teacher_set": "frozen"},)),
    # Robust soft label distillation (Zi et al., ICCV 2021): 5/6 on AEs, 1/6 on clean images.
    "rslad": Preset(({"hard_weight": 0.0, "kd_weight": 5 / 60, "kd_own": 1.0, "kd_clean": 1 / 60,
                      "teacher_input": "clean", "teacher_set": "frozen"},), (TEACHER_ATTACK,)),
}))
