"""Every rule between settings: one configuration that breaks it, one next to it that does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mat_dist.config import config_warnings, load_config, rules
from mat_dist.config.methods import methods
from mat_dist.config.presets import LossWeights
from mat_dist.core.objective import steps_alone
from mat_dist.errors import ConfigError

UNION = "peers=1 loss=at union.threats=linf:0.1,l2:1,l1:9"
COHORT = ("peers=3 peers.0.role=specialist peers.1.role=specialist peers.1.threat=l2 peers.1.threat.eps=1 "
          "peers.2.role=generalist")
GUIDED = "peers=2 peers.1.frozen=true peers.1.init_from=x"
FREE = "loss=at attack.method=free attack.steps=1 train.replays=2"
EXPERT = f"{COHORT} peers.2.loss.teacher_set=expert peers.2.loss.kd_own=0.5 peers.2.loss.hard_own=0.5"
TAUGHT = f"{COHORT} loss=mat_union peers.2.union.threats="
# rule, overrides of the default that break it, part of the message, overrides that keep it
CASES = [
    ("radius_is_known", "peers.1.threat=l2", "there is no standard one for digits (command line, peers.1.threat): give "
     "attack.eps too, or threat: {norm: l2, eps: ...}; on cifar10 it is 0.5", "peers.1.threat={norm: l2, eps: 4}"),
    ("radius_is_known", "threat=l1 data.name=svhn data.root=x", "no standard one for svhn",
     "threat=l2 data.name=svhn data.root=x"),
    ("radius_fits_pixels", "threat.eps=8", "write eps: 8/255", "threat.eps=8/255"),
    ("radius_fits_pixels", "attack.eps=16", "write eps: 16/255", "attack.eps=1"),
    ("radius_fits_pixels", "threat.eps=1.5", "such as 8/255", "threat.eps=1.5 threat.norm=l2"),
    ("radius_fits_pixels", "peers.2.threat.eps=4", "(command line, peers.2.threat.eps)",
     "peers.2.threat={norm: l2, eps: 4}"),
    ("attack_can_start", "attack.loss=kl_clean attack.start=zero", "no gradient at its start", "attack.start=zero"),
    ("attack_can_start", "peers.1.loss=trades attack.start=zero", "write start: gaussian", "peers.1.loss=trades"),
    ("names_are_unique", "peers.0.name=a peers.3.name=a", "peers.0 and peers.3 have the same name a", "peers.0.name=a"),
    ("names_are_unique", "peers.0.name=peer2", "the same name peer2", "peers.0.name=peer4"),
    ("names_are_unique", "peers.0.name=best", "the name best has another meaning", "peers.0.name=bests"),
    ("streams_are_unique", "peers.0.stream=2", "peers.0 and peers.2 have the same stream 2", "peers.0.stream=4"),
    ("n_fgsm_fits", "attack.method=n_fgsm attack.steps=2", "write attack.steps: 1",
     "attack.method=n_fgsm attack.steps=1"),
    ("n_fgsm_fits", "attack.method=n_fgsm attack.steps=1 step.wire=int8", "AEs of n_fgsm leave the ball",
     "attack.method=n_fgsm attack.steps=1 step.wire=full"),
    ("n_fgsm_fits", "attack.method=n_fgsm attack.steps=1 peers.1.threat={norm: l2, eps: 4}", "write threat.norm: linf",
     "attack.method=n_fgsm attack.steps=1 peers.1.threat=linf"),
    ("free_attacks_fit", "train.replays=2", "train.replays 2 with attack.method pgd", FREE),
    ("free_attacks_fit", "loss=at attack.method=free attack.steps=1", "write 8 (Free-AT on CIFAR-10)", FREE),
    ("free_attacks_fit", f"{FREE} attack.steps=3", "write attack.steps: 1", FREE),
    ("free_attacks_fit", f"{FREE} attack.start=uniform", "write start: zero", f"{FREE} attack.start=zero"),
    ("free_attacks_fit", f"{FREE} attack.loss=margin", "write attack.loss: ce", f"{FREE} attack.loss=ce"),
    ("free_attacks_fit", f"{FREE} loss=trades", "which has no hard labels on own AEs", f"{FREE} loss=mat"),
    ("free_attacks_fit", f"{FREE} peers.1.attack.method=pgd", "write attack.method: free for all peers", FREE),
    ("free_attacks_fit", f"{FREE} peers.1.frozen=true peers.1.init_from=run", "a peer that does not learn", FREE),
    ("free_attacks_fit", f"{FREE} peers.1.union.strategy=avg peers.1.union.threats=linf:0.1,l2:1",
     "free beside union.strategy avg", FREE),
    ("perturbations_can_be_kept", "peers=1 loss=at methods.warm_start.reset_epochs=0 data.augment.cutmix=1",
     "data.augment.cutmix", "peers=1 loss=at methods.warm_start.reset_epochs=0"),
    ("perturbations_can_be_kept", "methods.warm_start.reset_epochs=0 attack.method=n_fgsm attack.steps=1",
     "the peer has attack.method n_fgsm", "attack.method=n_fgsm attack.steps=1"),
    ("perturbations_can_be_kept", f"{UNION} union.strategy=max methods.warm_start.reset_epochs=0",
     "kept for one threat", "methods.warm_start.reset_epochs=0"),
    ("perturbations_can_be_kept", "methods.warm_start.reset_epochs=0 data.generated=x.npz data.generated_share=0.5",
     "switch data.generated off", "methods.warm_start.reset_epochs=0"),
    ("somebody_is_there_to_learn_from", "peers=1", "preset mat distils from other peers", "peers=1 loss=at"),
    ("somebody_is_there_to_learn_from", "peers=1 loss=mat_kd", "write loss.preset: at (or trades)",
     "peers=1 loss=trades"),
    ("somebody_is_there_to_learn_from", "peers=1 loss=at loss.hard_own=0.5", "other peers' examples",
     "peers=1 loss=mat_share"),
    ("somebody_is_there_to_learn_from", "peers=1 loss=at peers.0.role=generalist", "a generalist without specialists",
     "peers=1 loss=at peers.0.role=generalist union.strategy=max union.threats=linf:0.1,l2:1"),
    ("somebody_is_there_to_learn_from", "peers=2 peers.all.role=generalist", "a generalist without specialists",
     "peers=2 peers.0.role=generalist peers.1.role=specialist"),
    ("somebody_is_there_to_learn_from", "peers=2 peers.all.role=specialist loss.kd_weight=0.5",
     "no peer that a specialist learns from", "peers=2 peers.all.role=specialist"),
    ("somebody_is_there_to_learn_from", "peers=2 peers.0.loss=rslad", "a frozen teacher, and there is none",
     "peers=2 peers.0.loss=rslad peers.1.frozen=true peers.1.init_from=x"),
    ("somebody_guides", "peers=1 loss=at attack.loss=kl_teacher", "needs a teacher",
     "peers=2 loss=at attack.loss=kl_teacher"),
    ("somebody_is_there_to_learn_from", "peers=3 peers.2.role=generalist", "a generalist without specialists",
     "peers=3 peers.2.role=generalist peers.0.role=specialist"),
    ("some_term_counts", "loss=at loss.hard_weight=0", "all terms of the loss have weight 0",
     "loss=at loss.hard_weight=0 loss.clean_weight=1"),
    ("some_term_counts", "loss.kd_weight=1", "no peer learns from labels", "peers.1.loss.kd_weight=1"),
    ("teachers_know_the_view", "loss.teacher_set=owner loss.kd_own=0.5", "write kd_own: 0", "loss.teacher_set=owner"),
    ("teachers_know_the_view", "loss.teacher_set=owner loss.kd_own=1", "no teacher on own examples, kd_own is 1",
     "loss=at loss.teacher_set=owner loss.kd_own=1"),
    ("teachers_know_the_view", "loss.teacher_set=owner loss.kd_clean=0.2", "no teacher on clean images",
     "loss.kd_clean=0.2"),
    ("teachers_know_the_view", "loss.teacher_set=expert loss.kd_clean=0.2", "expert leaves no teacher on clean images",
     "loss.teacher_set=expert"),
    ("teachers_know_the_view", f"{EXPERT} peers.2.union.threats=l1:9,linf:0.1 peers.2.union.strategy=avg",
     "learns from defends l1", f"{EXPERT} peers.2.union.threats=linf:0.1,l2:1 peers.2.union.strategy=avg"),
    ("teachers_know_the_view", f"{EXPERT} peers.2.union.threats=linf:0.1,l2:1 peers.2.union.strategy=msd",
     "are of several norms at once", f"{EXPERT} peers.2.union.threats=linf:0.1,l2:1 peers.2.union.strategy=max"),
    ("teachers_know_the_view", f"{TAUGHT}linf:0.1,l2:1,l1:9", "preset mat_union with teacher_set expert, and no peer "
     "that peer2 learns from defends l1", f"{TAUGHT}linf:0.1,l2:1"),
    ("teachers_know_the_view", f"{TAUGHT}l2:1,linf:0.1 peers.0.threat={{norm: l2, eps: 4}}",
     "role: specialist for each of linf", f"{TAUGHT}l2:1,linf:0.1 peers.1.frozen=true peers.1.init_from=x"),
    ("somebody_is_there_to_learn_from", "peers=1 loss=mat_union peers.0.role=generalist union.threats=linf:0.1,l2:1",
     "preset mat_union distils from other peers, and there is one", "peers=1 loss=at union.threats=linf:0.1,l2:1 "
     "peers.0.role=generalist union.strategy=max"),
    ("unions_fit", f"{COHORT} loss=mat_union", "strategy max with 0 threats", f"{TAUGHT}linf:0.1,l2:1"),
    ("frozen_peers_have_weights", "peers.1.frozen=true", "without trained weights",
     "peers.1.frozen=true peers.1.init_from=x"),
    ("frozen_peers_have_weights", "peers.all.frozen=true peers.all.init_from=x", "all peers are frozen",
     "peers.0.frozen=true peers.0.init_from=x"),
    ("single_images_have_a_divergence", "loss.kd_where=student_wrong loss.kd_loss=mse", "write kd_loss: kl",
     "loss.kd_where=student_wrong"),
    ("warm_ups_end", "loss.warmup_epochs=5 train.epochs=5", "learns alone for 5 of 5 epochs",
     "loss.warmup_epochs=4 train.epochs=5"),
    ("warm_ups_end", "optim.warmup_epochs=5 train.epochs=5", "the rise of onecycle lasts 5 of 5 epochs",
     "optim.warmup_epochs=4 train.epochs=5"),
    ("warm_ups_end", "optim.schedule=cosine peers.1.optim.warmup_epochs=99", "the warm-up lasts 99",
     "optim.schedule=cosine peers.1.optim.warmup_epochs=1"),
    ("warm_ups_end", "peers=2 loss=mat_late loss.kd_weight=1 loss.hard_weight=0 peers.1.loss=mat",
     "learns from teachers only", "peers=2 loss=mat_late peers.1.loss=mat"),
    ("warm_ups_end", "peers=2 peers.0.loss=lbgat peers.1.loss=lbgat peers.1.loss.warmup_epochs=1",
     "learns from teachers only", "peers=2 peers.0.loss=lbgat peers.1.loss=lbgat peers.0.loss.warmup_epochs=1"),
    ("mixed_labels_are_understood", "loss=mart data.augment.cutmix=1",
     "loss.preset (preset mart) asks for one label per image", "loss=trades data.augment.cutmix=1"),
    ("mixed_labels_are_understood", "loss.kd_where=teacher_right data.augment.cutmix=0.5", "or kd_where: all",
     "data.augment.cutmix=0.5"),
    ("mixed_labels_are_understood", f"{UNION} union.strategy=ramp data.augment.cutmix=0.5", "or strategy: max",
     f"{UNION} union.strategy=max data.augment.cutmix=0.5"),
    ("mixed_labels_are_understood", "peers=1 loss=at attack.loss=margin data.augment.cutmix=0.5", "attack.loss: ce",
     "peers=1 loss=at data.augment.cutmix=0.5"),
    ("mixed_labels_are_understood", f"{GUIDED} peers.1.attack.loss=margin data.augment.cutmix=1", "attack.loss: ce",
     f"{GUIDED} data.augment.cutmix=1"),
    ("mixed_labels_are_understood", f"{UNION} union.strategy=eat data.augment.cutmix=0.5", "union.strategy (preset at)",
     f"{UNION} union.strategy=msd data.augment.cutmix=0.5"),
    ("unions_fit", "peers=1 loss=at union.strategy=max", "strategy max with 0 threats", f"{UNION} union.strategy=max"),
    ("unions_fit", "peers=1 loss=at union.strategy=avg union.threats=linf:0.1", "with 1 threats",
     f"{UNION} union.strategy=avg"),
    ("unions_fit", f"{COHORT} peers.2.union.strategy=msd", "those of other peers are finished",
     f"{COHORT} peers.2.union.strategy=msd peers.2.union.threats=linf:0.1,l2:1"),
    ("unions_fit", f"{COHORT} peers.2.union.strategy=eat peers.2.loss=at", "strategy eat with 0 threats",
     f"{COHORT} peers.2.union.strategy=avg"),
    ("unions_fit", UNION, "without a strategy", f"{UNION} union.strategy=random"),
    ("unions_fit", f"{UNION},l2:1 union.strategy=msd", "one norm twice", f"{UNION} union.strategy=msd"),
    ("unions_fit", "peers=1 loss=at union.strategy=eat union.threats=linf:0.1,l2:1", "without linf and l1",
     f"{UNION} union.strategy=eat"),
    ("unions_fit", f"{COHORT} peers.2.union.strategy=max peers.1.threat=linf", "the specialists have one norm",
     f"{COHORT} peers.2.union.strategy=max"),
    ("unions_fit", f"{COHORT} peers.2.union.strategy=avg peers.1.threat=linf", "the specialists have one norm",
     f"{COHORT} peers.2.union.strategy=avg"),
    ("unions_fit", f"{COHORT} peers.2.union.strategy=avg peers.2.union.threats=linf:0.1,l2:1",
     "from the AEs of others alone",
     f"{COHORT} peers.2.union.strategy=avg peers.2.union.threats=linf:0.1,l2:1 peers.2.loss.hard_own=0.5"),
    ("unions_fit", "peers=1 loss=trades union.strategy=max union.threats=linf:0.1,l2:1",
     "preset trades, which has no hard labels", "peers=1 loss=trades union.strategy=msd union.threats=linf:0.1,l2:1"),
    ("data_fill_a_batch", "data.generated=x.npz", "images in data.generated, 0 of them",
     "data.generated=x.npz data.generated_share=0.7"),
    ("data_fill_a_batch", "data.generated_share=0.7", "no images in data.generated, 67 of them",
     "data.generated_share=0"),
    ("data_fill_a_batch", "train.batch_size=8 data.generated=x.npz data.generated_share=0.99", "8 of them in a batch",
     "train.batch_size=8 data.generated=x.npz data.generated_share=0.9"),
    ("data_fill_a_batch", "data.train_size=28 data.generated=x.npz data.generated_share=0.7",
     "do not fill a batch of 29", "data.train_size=29 data.generated=x.npz data.generated_share=0.7"),
    ("data_fill_a_batch", "data.train_size=95", "95 training images do not fill a batch of 96", "data.train_size=96"),
    ("paths_are_plain", "data.generated=a\nb data.generated_share=0.5", "control character",
     "data.generated=ab data.generated_share=0.5"),
    ("paths_are_plain", "run.root=a\nb", "a control character", "run.root=../some/where"),
    ("paths_are_plain", "data.root=\0", "a control character", "data.root=/a"),
    ("averages_are_kept", "step.teachers=ema optim.ema_decay=null", "write a decay", "step.teachers=ema"),
    ("averages_are_kept", "step.teachers=ema methods.swa.start=0.5", "leave methods.swa out",
     "loss=at methods.swa.start=0.5"),
    ("milestones_rise", "optim.milestones=[0.5,0.5]", "not increasing shares", "optim.milestones=[0.5,0.6]"),
    ("milestones_rise", "optim.milestones=[0.5,1]", "[100/110, 105/110]", "optim.milestones=[]"),
    ("milestones_rise", "optim.milestones=[100,105]", "not increasing shares", "optim.milestones=[100/110,105/110]"),
    ("milestones_rise", "optim.milestones=[0,0.75]", "not increasing shares", "optim.milestones=[0.1,0.75]"),
    ("evaluations_attack_every_threat", "eval.attack=cr threat=l2 attack.eps=0.5", "write pgd", "eval.attack=cr"),
    ("batch_can_be_split", "train.batch_size=1", "a batch of one image", "train.batch_size=2"),
    ("batch_can_be_split", "train.batch_size=100 train.accumulate=3", "a divisor of 100",
     "train.batch_size=99 train.accumulate=3"),
    ("batch_can_be_split", "train.batch_size=8 train.accumulate=8", "write at most 4",
     "train.batch_size=8 train.accumulate=4"),
    ("weights_climb_an_own_loss", "peers=2 peers.0.loss=lbgat peers.1.loss=lbgat methods.awp.gamma=0.01",
     "preset lbgat has none here", "peers=2 peers.0.loss=lbgat peers.1.loss=lbgat peers.0.methods.awp.gamma=0.01"),
    ("data_can_be_found", "data.name=folder", "train/<class>/", "data.name=folder data.root=x"),
    ("data_can_be_found", "data.name=npz", "an .npz file", "data.name=npz data.root=x"),
    ("data_can_be_found", "data.name=cifar10", "cifar10 data without data.root", "data.name=cifar10 data.root=x"),
    ("data_can_be_found", "data.name=svhn data.download=true", "where download: true may put them",
     "data.name=svhn data.root=x data.download=true"),
    ("data_can_be_found", "data.name=cifar100", "cifar100 data without data.root", "data.name=fashion_mnist"),
    ("backend_fits_device", "run.device=cpu comm.backend=nccl", "nccl needs GPUs", "run.device=cpu comm.backend=gloo"),
]


def words(text: str) -> list[str]:
    return text.replace("{norm: l2, eps: 4}", "{norm:_l2,_eps:_4}").split(" ")


def load(text: str) -> None:
    load_config("digits", [word.replace("_l2", " l2").replace("_eps:_", " eps: ") for word in words(text)])


@pytest.mark.parametrize(("rule", "broken", "message", "kept"), CASES, ids=[f"{c[0]}-{n}" for n, c in enumerate(CASES)])
def test_a_broken_rule_is_the_one_problem_and_its_neighbour_passes(
    rule: str, broken: str, message: str, kept: str
) -> None:
    load(kept)
    with pytest.raises(ConfigError) as caught:
        load(broken)
    (problem,) = caught.value.problems
    assert message in str(problem)
    assert "command line" in problem.where or "configs" in problem.where


def test_every_rule_has_a_case() -> None:
    """Those of methods too."""
    found = [*rules._RULES, *(one for method in methods().values() for one in method.rules)]
    assert {function.__name__ for function, _ in found} == {case[0] for case in CASES}


def test_all_broken_rules_are_reported_at_once() -> None:
    broken = "threat.eps=8 peers.0.name=peer1 train.batch_size=1 data.name=npz optim.milestones=[2]"
    with pytest.raises(ConfigError) as caught:
        load(f"{broken} run.device=cpu comm.backend=nccl")
    assert len(caught.value.problems) == 6


def test_a_rule_is_silent_where_a_value_it_reads_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("threat: {eps: 8, nrm: l2}\ntrain: {batch_size: 1}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    whats = sorted(problem.what for problem in caught.value.problems)
    assert whats == ["a batch of one image has no batch statistics", "there is no setting threat.nrm"]


def test_unknown_norms_are_told_alone_and_a_missing_expert_with_all_other_mistakes() -> None:
    def found(text: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text)
        return [problem.what for problem in caught.value.problems]

    assert found(f"{TAUGHT}linf:0.1,l2:1 peers.1.threat.norm=l7") == ["'l7' cannot be used for peers.1.threat.norm"]
    assert found(f"{COHORT} peers.2.union.strategy=max peers.1.threat.norm=l7") == [
        "'l7' cannot be used for peers.1.threat.norm"]
    for text in (f"{TAUGHT}linf:0.1,l2", "peers=3 loss=at peers.2.role=generalist peers.2.union.threats=linf:0.1,l2"):
        assert found(text) == ["'linf:0.1,l2' cannot be used for peers.2.union.threats"]
    assert len(found(f"{TAUGHT}linf:0.1,l1:9 peers.0.name=peer1 train.batch_size=1 optim.milestones=[2]")) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("attack.step_size=0.3", "attack.step_size 0.3 is more than 2 eps = 0.2"),
        ("attack.step_size=2", "is more than 2 eps = 0.2; 2/255?"),
        ("peers.1.attack.step_size=0.3 peers.3.attack.step_size=0.3", "(peer1, peer3)"),
        ("data.augment.idbh=weak data.augment.pad=4", "data.augment.idbh weak crops and erases itself"),
        ("peers=2 loss=lbgat peers.1.loss.label_smoothing=0.2", "no cross-entropy that takes it (peer1)"),
        ("methods.ramp.weight=1", "methods.ramp does nothing without union.strategy ramp"),
        ("loss=at loss.temperature=4", "loss.temperature does nothing with these weights of the loss (preset at)"),
        ("loss.kd_loss=mse loss.temperature=4", "loss.temperature does nothing"),
        ("loss=trades loss.teacher_set=owner", "loss.teacher_set does nothing"),
        ("loss=at peers.1.loss.kd_where=teacher_right", "loss.kd_where does nothing with these weights of the loss "
                                                        "(preset at) (peer1)"),
        ("loss=at loss.warmup_epochs=2", "loss.warmup_epochs does nothing"),
        ("loss=trades loss.hard_own=0.5", "loss.hard_own does nothing"),
        ("methods.swa.start=0.95 train.epochs=10", "from its start on there is one end of 10 epochs"),
        ("loss=at step.teachers=ema", "step.teachers ema does nothing where nobody learns"),
        ("attack.method=n_fgsm attack.steps=1 attack.start=zero", "attack.start does nothing with n_fgsm"),
        ("attack.method=apgd attack.step_size=0.01", "the first step of APGD, which never grows"),
        ("loss=at attack.method=apgd union.threats=linf:0.1,l2:1 union.strategy=msd", "beside union.strategy msd sets"),
        ("attack.steps=1 attack.step_size=0.01", "shorter than eps = 0.1; attack.step_size null fits"),
        ("peers=4 loss=lbgat", "lbgat was published for 2 peers"),
        ("loss=cat", "published for 2 peers"),
        ("peers.1.loss=cat", "cat is meant for all peers"),
        ("data.name=folder data.root=x", "data.image_size is not set"),
        ("data.augment.flip=true", "mirrors the digits of digits"),
        ("eval.attack=cr eval.steps=50", "eval.steps does nothing with eval.attack cr"),
        ("eval.attack=cr eval.test_steps=100", "eval.test_steps does nothing with eval.attack cr"),
        ("peers.0.attack.start=zero peers.0.init_from=x peers.2.attack.start=zero peers.2.init_from=x", "stay equal"),
    ],
)
def test_unusual_settings_are_warned_about(overrides: str, message: str) -> None:
    (line,) = config_warnings(load_config("digits", overrides.split(" ")))
    assert message in line


def test_ordinary_settings_are_not_warned_about() -> None:
    for overrides in ([], ["loss=cat", "peers=2"], ["loss=trades", "loss.temperature=2"], ["step.teachers=ema"],
                      ["attack.method=apgd"], ["methods.swa.start=0.9", "train.epochs=10"],
                      ["loss=trades", "attack.method=n_fgsm", "attack.steps=1"],
                      ["loss=mat_trades", "loss.warmup_epochs=1", "loss.teacher_input=own_ae"],
                      ["attack.step_size=0.2"], ["attack.steps=1"], ["attack.steps=2"],
                      ["attack.start=zero"], ["peers.all.init_from=x"], ["eval.attack=cr", "eval.test_steps=0"]):
        assert config_warnings(load_config("digits", overrides)) == []


@pytest.mark.parametrize("preset,index,loss,start", [
    ("at", 0, "ce", "uniform"), ("trades", 0, "kl_clean", "gaussian"), ("mart", 0, "ce", "gaussian"),
    ("lbgat", 1, "kl_clean", "gaussian"), ("cat", 0, "kl_clean", "gaussian"), ("cat", 1, "ce", "uniform"),
])
def test_a_preset_attacks_as_its_authors_code_does(preset: str, index: int, loss: str, start: str) -> None:
    """mart.py and lbgat.py of the authors start at 0.001 normal noise; LBGAT raises KL to its own clean prediction."""
    attack = load_config(None, [f"loss={preset}", "peers=2"]).peers[index].attack
    assert (attack.loss, attack.start) == (loss, start)


def test_the_average_of_a_preset_can_be_switched_off() -> None:
    words = ["peers=1", "loss=at_wa"]
    assert load_config("base", words).peers[0].optim.ema_decay == 0.9995
    config = load_config("base", [*words, "optim.ema_decay=null"])
    assert not config.peers[0].averages


@pytest.mark.parametrize("words,total,alone", [
    ([], 936, 312), ([], 30, 10), (["loss=mat"], 936, 0), (["loss.warmup_epochs=0"], 936, 0),
    (["loss.warmup_epochs=2.5"], 20, 97.5)])
def test_a_preset_of_late_distillation_waits_for_a_third_of_all_steps(words: list[str], total: int, alone: float
                                                                      ) -> None:
    config = load_config("base", ["peers=2", "loss=mat_late", *words])
    assert {steps_alone(LossWeights.of(peer.loss), total, 39) for peer in config.peers} == {alone}
    assert not [text for text in config_warnings(config) if "loss." in text]


def test_the_even_average_takes_the_place_of_the_decaying_one() -> None:
    peers = load_config("digits", ["optim.ema_decay=0.9", "peers.1.methods.swa.start=0.5"]).peers
    assert [peer.optim.ema_decay for peer in peers] == [0.9, None, 0.9, 0.9] and all(peer.averages for peer in peers)


def test_specialists_that_nobody_learns_from_are_warned_of() -> None:
    alone = ["peers=2", "peers.all.role=specialist"]
    def unheard(words: list[str]) -> list[str]:
        notes = config_warnings(load_config("digits", words))
        return [text.partition(":")[0] for text in notes if "a specialist that nobody learns from" in text]

    assert unheard(alone) == ["peer0, peer1"]
    assert unheard(["peers=2", "peers.0.role=specialist", "peers.1.role=generalist"]) == []
    union = ["peers=4", "loss=mat_union", *(f"peers.{i}.role=specialist" for i in range(3)), "peers.3.role=generalist",
             "peers.1.threat={norm: l2, eps: 1}", "peers.2.threat={norm: l1, eps: 9}"]
    assert unheard([*union, "peers.3.union.threats=linf:0.1,l2:1"]) == ["peer2"]
    assert unheard([*union, "peers.3.union.threats=linf:0.1,l2:1", "peers.3.loss.hard_own=0.5"]) == []
    assert unheard([*union, "peers.3.union.threats=linf:0.1,l2:1,l1:9"]) == []


def test_a_generalist_without_aes_of_its_own_is_warned_of() -> None:
    own = ["peers.2.union.strategy=msd", "peers.2.union.threats=linf:0.1,l2:1"]
    roles = ["peers=3", "peers.0.role=specialist", "peers.1.role=specialist", "peers.2.role=generalist"]
    assert any("peer2: a generalist without AEs" in text for text in config_warnings(load_config("digits", roles)))
    assert not any("without AEs" in text for text in config_warnings(load_config("digits", [*roles, *own])))
