"""`--dry-run` against numbers computed by hand, and against what a real step does."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mat_dist import train
from mat_dist.config import load_config
from mat_dist.config.schema import Config
from mat_dist.core.cohort import Cohort
from mat_dist.core.step import Batch, train_step
from mat_dist.data import load_data
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.placement import Placement
from mat_dist.errors import EnvironmentFault
from mat_dist.models.registry import Images
from mat_dist.tools.check.__main__ import main as check
from mat_dist.tools.dryrun import KNOWN_IMAGES, describe_run, training_passes
from tests.unit.data_files import write_folder

CONFIGS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.yaml"))
CPU = torch.device("cpu")


def config_of(*overrides: str, config: str | None = None) -> Config:
    return load_config(config, overrides)


def description(config: Config, world: int = 1) -> str:
    """The text behind the resolved settings."""
    return describe_run(config, Launch(world=world, local_world=world), CPU).split("\nplacement ")[1]


def cells(text: str, part: str) -> dict[str, list[str]]:
    """First cell -> the other cells of the rows below the line that begins with `part`."""
    block = text.split(f"\n{part}")[1].split("\n\n")[0]
    return {words[0]: words[1:] for words in (line.split() for line in block.splitlines()[1:])}


def test_a_peer_of_four_that_learns_from_all_sources_makes_11_passes_and_all_make_44() -> None:
    passes = cells(description(config_of()), "passes")  # digits: preset mat, 4 peers, 7 attack steps
    # 7 attack steps, own AEs and those of 3 others; the logits that it teaches come from these forwards.
    assert passes["peer2"] == ["7", "4", "0", "11", "11"]
    assert passes["all"] == ["28", "16", "0", "44", "44"]


def test_the_table_of_peers_names_every_threat_of_a_union() -> None:
    rows = cells(description(config_of("peers.0.threat=l2", "peers.0.attack.eps=1/2", "peers.1.union.strategy=max",
                                       "peers.1.union.threats=linf:8/255,l1:12")), "peers")
    assert [" ".join(rows[f"peer{n}"][2:-2]) for n in range(3)] == [
        "l2 1/2 PGD-7", "union (max): linf 8/255, l1 12 PGD-7", "linf 1/10 PGD-7"]
    rows = cells(description(config_of(*f"{ROLES}peers.2.union.strategy=avg".split())), "peers")
    assert "union (avg): those of the specialists" in " ".join(rows["peer2"])


def test_a_peer_that_recomputes_teaches_in_passes_of_their_own() -> None:
    passes = cells(description(config_of("step.memory=recompute")), "passes")
    assert passes["peer0"] == ["7", "4", "4", "15", "11"]


UNION = "peers=1 loss=at union.threats=linf:0.1,l2:1,l1:2 union.strategy="
ROLES = ("peers=3 peers.0.role=specialist peers.1.role=specialist peers.1.threat=l2 peers.1.attack.eps=1 "
         "peers.2.role=generalist ")
TAUGHT = "peers=2 peers.1.frozen=true peers.1.init_from=run peers.0.loss="


MORE = [
    "peers=2 loss=mat attack.method=free train.replays=2",
    *(f"peers=2 loss={preset}" for preset in ("at", "mat_share", "mat_kd", "dml_at", "trades", "mat_trades",
                                              "cat", "mart", "lbgat", "peeraid")),
    *(UNION + strategy for strategy in ("avg", "max", "ramp", "random", "msd")),
    *(ROLES + f"peers.2.union.strategy={strategy}" for strategy in ("avg", "max", "ramp")),
    ROLES + "peers.2.union.strategy=msd peers.2.union.threats=linf:0.1,l2:1",
    ROLES + "peers.0.loss.kd_weight=0.5",
    ROLES + "loss=mat_union peers.2.union.threats=linf:0.1,l2:1 peers.0.loss.kd_weight=0.5",
    TAUGHT + "ard", UNION + "avg attack.method=apgd attack.loss=kl_clean",
    "peers=2 loss=at methods.awp.gamma=0.01", UNION + "ramp methods.ramp.projection=0.5",
    UNION + "max methods.awp.gamma=0.01",
    "peers=2 loss=mat methods.awp.gamma=0.01 optim.ema_decay=0.9 step.teachers=ema",
    "peers=2 loss=mat attack.loss=kl_teacher attack.method=apgd"]


@pytest.mark.parametrize("memory", ["keep", pytest.param("recompute", marks=pytest.mark.slow)])
@pytest.mark.parametrize("settings", [
    "peers=2 loss=mat", TAUGHT + "rslad", UNION + "eat", "peers=2 loss=trades methods.awp.gamma=0.01",
    *(pytest.param(one, marks=pytest.mark.slow) for one in MORE)])
def test_the_passes_are_those_of_a_real_step(settings: str, memory: str) -> None:
    steps = 1 if "free" in settings else 2
    config = config_of(*settings.split(), f"step.memory={memory}", "train.batch_size=8", f"attack.steps={steps}")
    told, count = cells(description(config), "passes"), len(config.peers)
    cohort = Cohort.build(config, Mesh(Placement.place(count, 1, 0), CPU), Images((1, 8, 8), 10, (0.5,), (0.25,)),
                          steps_per_epoch=1)
    counts = {peer.name: [0, 0] for peer in cohort.peers}

    def passes(name: str) -> None:
        counts[name][0] += 1
        counts[name][1] += torch.is_grad_enabled()

    for peer in cohort.peers:
        peer.attack_of_training._called = peer.model  # the hook counts calls of the model, not of its copy
        peer.model.register_forward_hook(lambda *_, name=peer.name: passes(name))
    train_step(cohort, Batch(torch.rand(8, 1, 8, 8), torch.arange(8), 0))
    assert counts == {name: [int(n) for n in told[name][-2:]] for name in counts}


def test_passes_of_unions_awp_and_msd_are_those_computed_by_hand() -> None:
    def row(*overrides: str) -> list[str]:
        return cells(description(config_of(*overrides, "attack.steps=10")), "passes")["peer0"]

    threats = ("peers=1", "loss=at", "union.threats=linf:0.1,l2:1,l1:2")
    assert row(*threats, "union.strategy=avg") == ["30", "3", "0", "33", "33"]  # three attacks, three sources
    assert row(*threats, "union.strategy=random") == ["10", "1", "0", "11", "11"]
    assert row(*threats, "union.strategy=msd") == ["10", "1", "0", "41", "11"]  # and a look at each norm's step
    assert row(*threats, "union.strategy=eat") == ["10", "1", "0", "12", "11"]  # and PGD's last point
    ramp = ("union.strategy=ramp", "methods.ramp.projection=0.5")  # and the gradient on clean images
    assert row(*threats, *ramp) == ["30", "4", "0", "34", "34"]
    assert row("peers=1", "loss=at", "methods.awp.gamma=0.01") == ["10", "2", "0", "12", "12"]
    assert row("peers=1", "loss=trades", "methods.awp.gamma=0.01") == ["10", "4", "0", "15", "14"]  # the clean one


def test_free_training_has_no_passes_but_those_of_learning_and_longer_epochs() -> None:
    free = ("loss=at", "attack.method=free", "attack.steps=1", "train.replays=8", "train.epochs=2", "data.val_size=100")
    text = description(config_of(*free, "train.batch_size=256"))
    assert cells(text, "passes")["all"] == ["0", "4", "0", "4", "4"]
    assert "schedule: 80 steps, 40 per epoch" in text and "320 forward, 320 backward" in text


def test_parameters_and_epoch_of_the_cifar_run_are_those_computed_by_hand() -> None:
    text = description(config_of(config="cifar10_resnet18"))
    assert cells(text, "peers")["peer0"][1] == "11,172,170"
    # 50 000 images without the 1000 of the validation split, in batches of 128, the rest dropped; 110 epochs.
    assert "schedule: 42,020 steps, 382 per epoch, 128 images each" in text
    # Rates fall by 10 after 100 and 105 of 110 epochs (Rice et al., 2020).
    rates = cells(text, "schedule")
    assert {step: row[-1] for step, row in rates.items() if step != "step"} == {
        "0": "0.1", "38,200": "0.01", "40,110": "0.001", "42,019": "0.001"}


def test_two_replicas_halve_the_images() -> None:
    text = description(config_of("train.accumulate=2", config="cifar10_resnet18"), world=8)
    assert "passes per step, of 64 images each" in text and "4 peers on 8 ranks" in text


def travels(*overrides: str, world: int, config: str | None = None) -> str:
    text = description(config_of(*overrides, config=config), world).split("\ntravels per step: ")[1]
    return " ".join(text.split("\n\n")[0].split())


def test_the_bytes_that_travel_in_a_plain_cohort_are_those_counted_by_hand() -> None:
    """Digits, 4 peers, mat: each peer's AEs go to all, and each teaches on those of all four; 64 pixels, 10 classes."""
    aes, logits = 96 * 64 * 4, 4 * 96 * 10 * 4
    told = f"{aes:,} bytes of AEs (1 view) and {logits:,} bytes of logits views that stay with their makers: none"
    assert travels(world=4) == f"each rank sends {told}"
    assert travels(world=8) == f"each rank sends {told.replace(f'{aes:,}', f'{aes // 2:,}')}".replace(
        f"{logits:,}", f"{logits // 2:,}")  # two replicas of each peer, half of the batch on each
    assert travels(world=1) == f"nothing; with a rank for each peer, each would send {told}"
    assert f" {2 * aes:,} bytes of AEs (2 views)" in travels(world=2)  # two peers on each rank
    assert f" {96 * 64 * 2:,} bytes of AEs" in travels("step.wire=fp16", world=4)
    assert f" {96 * (64 + 4):,} bytes of AEs" in travels("step.wire=int8", world=4)  # and a scale for each image
    assert f" {logits + 96 * 10 * 4:,} bytes of logits" in travels("attack.loss=kl_teacher", world=4)  # clean ones
    assert travels("loss=at", world=4) == "each rank sends 0 bytes of AEs (0 views) and 0 bytes of logits views that " \
        "stay with their makers: peer0 (linf 1/10), peer1 (linf 1/10), peer2 (linf 1/10), peer3 (linf 1/10)"
    assert travels("loss=at", "peers=1", world=1) == "nothing, there is one peer"


EXPERTS = (*ROLES.split(), "threat.eps=0.1", "peers.2.union.strategy=max", "peers.2.union.threats=linf:0.1,l2:1",
           "peers.2.loss.hard_own=0.5", "peers.2.loss.kd_own=0.5", "peers.2.loss.teacher_set=expert")


def test_of_a_generalist_with_experts_the_bytes_are_those_counted_by_hand() -> None:
    """The generalist makes two views, which travel, since the specialist of each norm teaches on it; the specialists
    make one view, from which the generalist learns. So every rank sends two, those of the specialists padded. Each
    specialist teaches on its own view and on one of the generalist's."""
    aes, logits = 2 * 96 * 64 * 4, 2 * 96 * 10 * 4
    assert travels(*EXPERTS, world=3) == (f"each rank sends {aes:,} bytes of AEs (2 views) and {logits:,} bytes of "
                                          "logits views that stay with their makers: none")
    # Taught on the specialists' views alone, the generalist keeps its own ones; nobody waits for padding.
    assert travels(*EXPERTS, "peers.2.loss.kd_own=0", world=3) == (
        f"each rank sends {aes // 2:,} bytes of AEs (1 view) and {logits // 2:,} bytes of logits views that stay with "
        "their makers: peer2 (linf 1/10, l2 1)")


def test_of_mat_union_passes_and_bytes_are_those_counted_by_hand() -> None:
    """The generalist attacks and learns each of two norms; each specialist teaches on one of its views, and only these
    travel. Heard by the specialists, it teaches on their views, which travel then."""
    union = (*ROLES.split(), "loss=mat_union", "threat.eps=0.1", "attack.steps=10",
             "peers.2.union.threats=linf:0.1,l2:1")
    passes = cells(description(config_of(*union)), "passes")
    assert [passes[f"peer{i}"] for i in range(3)] == [["10", "1", "1", "12", "11"]] * 2 + [["20", "2", "0", "22", "22"]]
    aes, logits = 2 * 96 * 64 * 4, 96 * 10 * 4
    assert travels(*union, world=3) == (f"each rank sends {aes:,} bytes of AEs (2 views) and {logits:,} bytes of "
                                        "logits views that stay with their makers: peer0 (linf 1/10), peer1 (l2 1)")
    back = (*union, "peers.0.loss.kd_weight=0.5", "peers.1.loss.kd_weight=0.5")
    assert cells(description(config_of(*back)), "passes")["peer2"] == ["20", "2", "2", "24", "22"]
    assert travels(*back, world=3) == (f"each rank sends {aes:,} bytes of AEs (2 views) and {2 * logits:,} bytes of "
                                       "logits views that stay with their makers: none")


def test_the_passes_of_a_training_are_those_of_its_steps() -> None:
    assert training_passes(config_of("data.train_size=200", "train.batch_size=50", "train.epochs=3")) == (12, 528, 528)
    assert training_passes(config_of("data.name=folder", "data.root=x")) is None
    assert training_passes(config_of("data.name=folder", "data.root=x"), 10) == (10, 440, 440)
    assert training_passes(config_of("data.train_size=200"), 0) == (0, 0, 0)


def test_optimizers_that_torch_refuses_are_told_for_all_peers_before_a_run_folder_is_made(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["peers.0.optim.name=foo", "peers.1.optim.args.betas=[0.9, 0.95]", "peers.2.optim.name=adamw",
             "peers.2.optim.args.betas=[2, 0.95]", f"run.root={tmp_path / 'runs'}", "run.device=cpu"]
    for words in (["--dry-run", *wrong], wrong):
        assert train.main(words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line.partition(" (peers.")[0] for line in lines] == [
            "mat_dist: error: there is no optimizer foo", "mat_dist: error: SGD has no argument betas",
            "mat_dist: error: AdamW refuses its settings: Invalid beta parameter at index 0: 2"]
        assert "momentum, nesterov" in lines[1]
    assert not (tmp_path / "runs").exists()
    assert check(wrong) == 2
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error ")]
    assert [row.split()[1] for row in rows] == ["optimizers"] * 3


def test_the_known_images_are_those_of_the_data_set() -> None:
    config = config_of()
    data = load_data(config.data, seed=0, batch_size=config.train.batch_size, build_cache=True)
    assert KNOWN_IMAGES["digits"] == (data.train.shape, len(data.classes), len(data.train) + len(data.val))
    text = description(config)
    assert f"{len(data.train):,} for training" in text and f" {len(data.train) // 96} per epoch" in text


def test_a_subset_and_max_steps_shorten_the_schedule() -> None:
    text = description(config_of("data.train_size=200", "train.batch_size=50", "train.epochs=3", "train.max_steps=10"))
    assert "schedule: 10 steps, 4 per epoch, 50 images each" in text


def test_a_decay_of_the_averaged_weights_that_their_warm_up_never_reaches_is_told() -> None:
    """165 steps: the last decay is at most 165 / 174."""
    note = "optim.ema_decay 0.99 is never reached in so few steps: its warm-up allows 0.9483"
    assert note in description(config_of("optim.ema_decay=0.99"))
    assert not any("is never reached" in description(config_of(f"optim.ema_decay={decay}")) for decay in (0.94, "null"))


def test_peers_that_learn_alone_at_first_are_told_with_their_epochs() -> None:
    text = description(config_of("train.epochs=15", "peers=3", "peers.0.loss=mat_late", "peers.2.loss.warmup_epochs=2"))
    assert {name: row[-1] for name, row in cells(text, "loss").items() if name.startswith("peer")} == {
        "peer": "alone", "peer0": "5", "peer1": "0", "peer2": "2"}
    assert "epochs alone" not in description(config_of())


def test_a_training_that_is_cut_tells_of_warm_ups_that_it_never_ends() -> None:
    """11 steps an epoch."""
    cut = ["train.epochs=10", "train.max_steps=20", "peers=2"]
    text = description(config_of(*cut, "peers.1.loss.warmup_epochs=3", "peers.0.loss=mat_late",
                                 "peers.0.optim.warmup_epochs=2", "optim.schedule=constant"))
    assert [line for line in text.splitlines() if "all 20 steps" in line] == [
        "peer0: never has its whole learning rate in all 20 steps, because optim.warmup_epochs are 22: make them "
        "fewer, or train longer",
        "peer1: learns alone in all 20 steps, because loss.warmup_epochs are 33: make them fewer, or train longer"]
    assert "all 20 steps" not in description(config_of(*cut, "loss=mat_late"))


def test_peers_with_schedules_of_their_own_have_columns_of_their_own() -> None:
    text = description(config_of("peers.2.optim.schedule=constant", "peers.2.optim.lr=0.03"))
    assert "lr of peer0 (onecycle)  lr of peer2 (constant)" in text
    assert {row[-1] for step, row in cells(text, "schedule").items() if step != "step"} == {"0.03"}


def test_micro_batches_that_do_not_fit_are_refused_as_in_a_run() -> None:
    with pytest.raises(EnvironmentFault, match="micro-batches"):
        description(config_of("train.accumulate=32"), world=8)  # a replica has 48 of the 96 images


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_described_without_data_within_100_columns(
        name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    if "timm/" in path.read_text():
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    text = description(config_of(config=str(path)))
    assert max(map(len, text.splitlines())) <= 100
    assert [part for part in ("peers", "loss", "passes", "memory", "schedule") if f"\n{part}" not in text] == []
    assert not list(tmp_path.iterdir())
    assert not re.search(r"\bnan\b|\bNone\b", text)


# ------------------------------------------------------------------------------------------------ the data


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = train.main([*words, "--dry-run", "run.device=cpu"])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def own_npz(path: Path, **arrays: np.ndarray) -> str:
    x, y = np.zeros((60, 8, 9, 3), np.uint8), np.arange(60) % 3
    np.savez(path, **{"x_train": x, "y_train": y, "x_test": x[:20], "y_test": y[:20], **arrays})
    return f"data.root={path}"


def test_own_data_are_looked_at_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "set", train=30, classes=("a", "b", "c"))
    code, out, _ = dry_run(capsys, "data.name=folder", f"data.root={tmp_path / 'set'}", "train.batch_size=8",
                           "train.epochs=2")
    assert code == 0 and "folder: 72 for training, 3 x 8 x 8, 3 classes" in out and "schedule: 18 steps, 9 per" in out
    more = {"x_val": np.zeros(3), "y_train": np.arange(60.0)[None] % 3}
    code, out, _ = dry_run(capsys, "data.name=npz", own_npz(tmp_path / "a.npz", **more), "train.batch_size=8")
    assert code == 0 and "npz: 48 for training, 3 x 8 x 9, 3 classes" in out
    assert "note      arrays that are not read: x_val" in out and "note      train: labels of shape (1, 60)" in out


@pytest.mark.parametrize(("words", "change", "said"), [
    (["data.root=gone"], None, "the folder does not exist (data.root=gone)"),
    (["data.root=set"], "train/cat/0000.png", "cannot read the image (UnidentifiedImageError"),
    (["data.root=set", "train.batch_size=90"], None, "58 training images do not fill one batch of 90"),
    (["data.root=set", "data.test_size=99"], None, "99 test images asked for, 12 are there"),
    (["data.root=set", "data.val_size=71"], None, "cannot hold 71 validation images"),
    (["data.name=npz", "data.root=gone.npz"], None, "the file does not exist"),
    (["data.name=npz", "y_train", "data.root=a.npz"], None, "label 7 of image 0 is out of range"),
    (["data.name=npz", "x_test", "data.root=a.npz"], None, "train images are (3, 8, 9), test images (3, 8, 8)"),
    (["data.name=digits", "train.batch_size=1400"], None, "1150 training images do not fill one batch of 1400"),
    (["data.name=cifar10", "data.root=x", "data.train_size=49999"], None, "49999 training images asked for")])
def test_a_dry_run_ends_with_the_code_and_the_line_of_training(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str],
        change: str | None, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "set", train=36, test=6)
    spoiled = {"y_train": {"y_train": np.full(60, 7), "classes": np.array(list("abc"))},
               "x_test": {"x_test": np.zeros((20, 8, 8, 3), np.uint8)}}
    own_npz(tmp_path / "a.npz", **next((spoiled[word] for word in words if word in spoiled), {}))
    if change is not None:
        (tmp_path / "set" / change).write_bytes(b"no image")
    words = ["data.name=folder", "model=tiny_cnn", "attack.eps=8/255", "peers=1", "loss=at", "train.batch_size=8",
             *(word for word in words if word not in spoiled)]
    if not words[-1].startswith("data.train_size"):  # where training would look for the archive first
        code, _, dry = dry_run(capsys, *words)
        assert (train.main([*words, "run.device=cpu", "run.name=real"]), code) == (3, 3)
        assert capsys.readouterr().err == dry and said in dry
    else:
        assert dry_run(capsys, *words)[0] == 3


def test_data_that_must_be_read_to_know_are_not_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = dry_run(capsys, "data.name=cifar10", "data.root=gone")
    assert code == 0 and "cifar10: 49,000 for training" in out
