"""`python -m mat_dist export` and `mat_dist.export`: each form is loaded again by the library that it is for."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mat_dist
from mat_dist.__main__ import main
from mat_dist.attacks import Threat
from mat_dist.checkpoints.load import open_run
from mat_dist.config import load_config, load_plugins
from mat_dist.config.schema import ModelConfig, PeerConfig
from mat_dist.data import as_float, load_data
from mat_dist.errors import ConfigError, EnvironmentFault, MatError, OutputError
from mat_dist.evaluation.autoattack import chunk_seed
from mat_dist.evaluation.results import AutoAttack, Result, TargetResult, Verdict
from mat_dist.models import Ensemble, build_model
from mat_dist.models.registry import Images, model_names
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.lock import RunLock
from mat_dist.tools import export as exporting
from tests.documents import MODEL, ROOT
from tests.small_runs import run_small, tree_hash

# Loads model.py where nothing but torch and what torch itself imports can be imported, and writes its logits.
TORCH_ALONE = '''
import sys
import torch
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"mat_dist", "safetensors", "huggingface_hub", "torchvision", "timm", "numpy"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
from model import load
torch.save(load()(torch.load(sys.argv[1])), sys.argv[2])
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three peers of different networks, the last frozen, with averaged weights and a test."""
    root = tmp_path_factory.mktemp("runs")
    teacher = run_small(root, "teacher", "peers=1", "loss=at", "train.max_steps=1")
    done = run_small(root, "first", "peers=3", "peers.1.model=small_cnn", "peers.2.frozen=true", "optim.ema_decay=0.5",
                     f"peers.2.init_from={teacher.folder.path}", "eval.test_steps=1", "eval.every=1")
    assert done.code == 0
    return done.folder.path


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def module_of(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"exported_{abs(hash(file))}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and (one - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))


# ------------------------------------------------------------------ each form by its library


def test_model_py_gives_the_same_bits_with_torch_alone(run: Path, images: Tensor, here: Path) -> None:
    out, model = mat_dist.export(run, "safetensors", "out", peer="ensemble"), mat_dist.load(run, "ensemble")
    torch.save(images, here / "images.pt")
    subprocess.run([sys.executable, "-B", "-c", TORCH_ALONE, here / "images.pt", here / "logits.pt"], cwd=out,
                   check=True, timeout=100)
    assert torch.equal(torch.load(here / "logits.pt"), model(images))
    stored = load_file(out / "model.safetensors")
    assert {name: value.dtype for name, value in stored.items()} == {
        name: value.dtype for name, value in model.state_dict().items()}
    assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("peer", ["peer0", "ensemble"])
def test_huggingface_hub_loads_it_offline_and_saves_it_again(peer: str, run: Path, images: Tensor, here: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out, expected = mat_dist.export(run, "hf", here / "out", peer=peer), mat_dist.load(run, peer)(images)
    kind = module_of(out / "model.py").Model
    model = kind.from_pretrained(str(out), local_files_only=True, strict=True)
    assert not model.training and torch.equal(model(images), expected)
    model.save_pretrained(here / "again")
    assert torch.equal(kind.from_pretrained(str(here / "again"), strict=True)(images), expected)
    card = hub.ModelCard.load(out / "README.md")
    assert card.data.license == "unknown" and "adversarial-robustness" in card.data.tags


def test_torch_export_loads_it_for_batches_of_any_size(run: Path, images: Tensor, here: Path) -> None:
    assert main(["export", str(run), "--to", "torch_export", "--peer", "ensemble", "out"]) == 0
    loaded, model = torch.export.load("out/model.pt2").module(), mat_dist.load(run, "ensemble")
    assert all(close(loaded(some), model(some)) for some in (images, images[:1], images[:2]))


@pytest.mark.parametrize("peer", ["peer1", "ensemble"])
def test_onnxruntime_loads_it_for_batches_of_any_size(peer: str, run: Path, images: Tensor, here: Path) -> None:
    runtime = [pytest.importorskip(name) for name in ("onnx", "onnxscript", "onnxruntime")][-1]
    out, model = mat_dist.export(run, "onnx", "out", peer=peer), mat_dist.load(run, peer)
    session = runtime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    for some in (images, images[:1]):
        assert close(torch.from_numpy(session.run(["logits"], {"images": some.numpy()})[0]), model(some))


@pytest.fixture
def cifar(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's data are taken for CIFAR-10."""
    facts = exporting.facts

    def renamed(*arguments: Any) -> dict[str, Any]:
        told = facts(*arguments)
        data = told["config"].data.model_copy(update={"name": "cifar10"})
        return {**told, "config": told["config"].model_copy(update={"data": data})}

    monkeypatch.setattr(exporting, "facts", renamed)


def test_the_robustbench_folder_has_its_record_weights_and_loader(run: Path, images: Tensor, here: Path,
                                                                  cifar: None) -> None:
    out = mat_dist.export(run, "robustbench", "out", peer="ensemble")
    record = json.loads((out / "model_info/cifar10/Linf/first_ensemble.json").read_text())
    assert record["number_forward_passes"] == 2 and record["dataset"] == "cifar10" and record["eps"] == "1/10"
    assert record["architecture"] == "tiny_cnn, small_cnn"
    assert record["autoattack_acc"] == record["clean_acc"] == ""  # no evaluation with AutoAttack was made
    state = torch.load(out / "models/cifar10/Linf/first_ensemble.pt", weights_only=True)
    model = mat_dist.load(run, "ensemble")
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    # RobustBench strips these wherever they stand in a name.
    assert not any("model." in name or "module." in name for name in state)


def test_the_record_has_the_numbers_of_the_newest_reportable_autoattack() -> None:
    def result(share: float, *attacks: str, reportable: bool = True, split: str = "test", norm: str = "linf 8/255",
               version: str = "standard") -> tuple[Any, TargetResult]:
        checks = (Verdict("enough steps", "", reportable, ""),)
        return (Result(1, split, "", 0, (), (), {}, attacks, reportable=reportable, autoattack=AutoAttack(version)),
                TargetResult("peer0", "raw", 1000, {"clean": 0.9, norm: share, "union": share}, checks=checks))

    told = {"peers": [PeerConfig(model=ModelConfig(name="resnet18"))],
            "config": load_config(None, ["data.name=cifar10", "data.root=."]),
            "threat": Threat("linf", 8 / 255), "results": [
                result(0.1, "autoattack"), result(0.512, "autoattack", "pgd"), result(0.3, "pgd"),
                result(0.4, "autoattack", reportable=False), result(0.5, "autoattack", split="val"),
                result(0.6, "autoattack", norm="l2 1/2"), result(0.7, "autoattack", version="custom")]}
    record = json.loads(exporting.filled("model_info.json", told))
    assert (record["clean_acc"], record["autoattack_acc"], record["eps"]) == ("90.00", "51.20", "8/255")
    assert record["additional_data"] is False and record["architecture"] == "resnet18"


def test_robustbench_loads_it_into_its_zoo(run: Path, images: Tensor, here: Path, cifar: None,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("robustbench.utils", exc_type=ImportError)
    out = mat_dist.export(run, "robustbench", "out", peer="ensemble")
    monkeypatch.syspath_prepend(out)
    loaded = module_of(out / "robustbench_loader.py").load()
    assert not loaded.training and torch.equal(loaded(images), mat_dist.load(run, "ensemble")(images))


@pytest.mark.thorough
def test_autoattack_by_itself_finds_on_the_exported_ensemble_what_the_evaluation_finds(run: Path, here: Path) -> None:
    """Image by image, on 64 images. With the standard version, which takes minutes: docs/export.md."""
    pyautoattack = pytest.importorskip("pyautoattack", exc_type=ImportError)
    model = module_of(mat_dist.export(run, "safetensors", here / "out", peer="ensemble") / "model.py").load()
    before = set((run / "eval").glob("*.csv"))
    assert main(["evaluate", str(run), "attacks=autoattack", "version=custom", "custom=apgd-ce",
                 "targets=ensemble", "threats=linf:0.1", "split=train", "images=64", "checks=0", "eval.chunk=64"]) == 0
    (table,) = set((run / "eval").glob("*.csv")) - before
    rows = [row for row in csv.DictReader(table.open()) if row["attack"] == "autoattack"]
    config = load_config(str(run / "config.yaml"))
    data = load_data(config.data, seed=config.run.seed, batch_size=config.train.batch_size).train
    stored, y_B = data.batch(torch.tensor([int(row["sample"]) for row in rows]))
    attack = pyautoattack.AutoAttack(model, norm="Linf", eps=0.1, version="custom", attacks=["apgd-ce"],
                                     seed=chunk_seed(config.run.seed, "linf", 0))
    attack.logger.propagate = False
    adv_BCHW, _ = attack.run_standard_evaluation(as_float(stored), y_B, batch_size=64)
    assert (model(adv_BCHW).argmax(1) == y_B).tolist() == [row["robust"] == "1" for row in rows] and len(rows) == 64


# ------------------------------------------------------------------ each network


def written(tmp_path: Path, *configs: ModelConfig, shape: tuple[int, int, int] = (3, 32, 32), rule: str | None = None,
            dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A model with fresh weights and running statistics, and the one that its model.py loads."""
    told = {"peers": [PeerConfig(model=config) for config in configs], "rule": rule, "target": "peer",
            "images": Images(shape, 7, (0.4,) * shape[0], (0.2,) * shape[0])}
    models = [build_model(config, shape=shape, classes=7, mean=(0.4,) * shape[0], std=(0.2,) * shape[0])
              for config in configs]
    model = (Ensemble(models, rule) if rule else models[0]).to(dtype).to(memory_format=torch.channels_last)
    x_BCHW = torch.rand(4, *shape, dtype=dtype)
    model.train()(x_BCHW)
    one = exporting._Exported(model.eval(), x_BCHW, told, tmp_path)
    return model, exporting._weights(one)


@pytest.mark.parametrize("config", [
    *(ModelConfig(name=name, width=0.25 if not name.startswith("wrn") else 0.1) for name in model_names()),
    *(ModelConfig(name=name, width=0.25, norm="group", activation="silu") for name in ("resnet18", "mobilenet_v2")),
    *(ModelConfig(name=one, width=0.1) for one in ("preact_resnet18+bare+early", "preact_resnet18+dm", "wrn_10_4+dm")),
    ModelConfig(name="torchvision/mobilenet_v3_small"), ModelConfig(name="timm/resnet10t"),
    ModelConfig(name="torchvision/squeezenet1_1", activation="softplus"),
    ModelConfig(name="torchvision/mobilenet_v2", norm="group")],
    ids=lambda config: "-".join(str(value) for value in config.model_dump().values() if value is not None))
def test_model_py_has_every_network_that_the_package_has(config: ModelConfig, tmp_path: Path) -> None:
    if config.name.startswith("timm/"):
        pytest.importorskip("timm")
    model, loaded = written(tmp_path, config)
    x_BCHW = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x_BCHW), model(x_BCHW))
    assert "mat_dist" not in re.sub(r'""".*?"""', "", (tmp_path / "model.py").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("rule", ["prob", "logit"])
def test_model_py_keeps_the_rule_and_precision_of_an_ensemble(rule: str, tmp_path: Path) -> None:
    model, loaded = written(tmp_path, ModelConfig(width=0.5), ModelConfig(name="small_cnn"), shape=(1, 9, 6), rule=rule,
                            dtype=torch.float64)
    x_BCHW = torch.rand(2, 1, 9, 6, dtype=torch.float64)
    assert torch.equal(loaded(x_BCHW), model(x_BCHW)) and loaded(x_BCHW).dtype == torch.float64


def test_a_network_of_a_plug_in_leaves_as_a_graph_and_not_as_source(tmp_path: Path, here: Path, images: Tensor) -> None:
    load_plugins([str(ROOT / MODEL)])
    done = run_small(tmp_path, "own", "peers=1", "loss=at", "model=my_model", "train.max_steps=1")
    with pytest.raises(ConfigError, match=r"my_model is that of a plug-in, .* --to torch_export"):
        mat_dist.export(done.folder.path, "safetensors", "out")
    assert not list(here.glob("*out*"))
    out = mat_dist.export(done.folder.path, "torch_export", "out")
    assert close(torch.export.load(out / "model.pt2").module()(images), mat_dist.load(done.folder.path)(images))


# ------------------------------------------------------------------ the card


def test_the_card_tells_the_numbers_of_the_result_files_of_this_model_alone(run: Path, here: Path) -> None:
    card = (mat_dist.export(run, "safetensors", "out", peer="peer1", licence="mit") / "README.md").read_text()
    opened = open_run(run)
    document = json.loads(next((run / "eval").glob(f"test_last_step_{opened.manifest.step:08d}.json")).read_text())
    (row,) = (one for one in document["targets"] if (one["target"], one["weights"]) == ("peer1", "ema"))
    low, high = row["interval_95"]["linf 1/10"]
    assert (f"| 40, test | PGD-1 | linf 1/10 | {100 * row['accuracy']['linf 1/10']:.2f} | {100 * low:.1f} to "
            f"{100 * high:.1f} | no: too few images |") in card
    assert len(re.findall("^[|] 40, ", card, re.MULTILINE)) == 4  # clean and attacked, on test and validation images
    environment = json.loads((run / "environment.json").read_text())
    assert f"| commit of mat_dist | {environment['git'] or 'unknown'} |" in card
    assert card.startswith('---\nlicense: "mit"\n') and "| networks | small_cnn |" in card
    assert "| cost of the whole cohort | 4 steps, " in card


def test_the_card_claims_no_training_for_weights_that_came_from_elsewhere(run: Path, here: Path) -> None:
    told = "| recipe | unknown: the weights came from elsewhere"
    frozen, trained = ((mat_dist.export(run, "safetensors", peer, peer=peer) / "README.md").read_text()
                       for peer in ("peer2", "peer0"))
    assert told in frozen and "| threat | unknown |" in frozen and "cost" not in frozen
    assert "| recipe | mat in a cohort of 3, training attack pgd of 1 steps" in trained
    torch.save(mat_dist.load(run, "peer0").state_dict(), "weights.pt")
    assert main(["evaluate", "weights.pt", "model=tiny_cnn", "model.width=0.25", "data.name=digits", "attacks=pgd",
                 "steps=1", "images=20", "checks=0", "threats=linf:0.1", "run.device=cpu"]) == 0
    (imported,) = Path("runs").iterdir()
    card = (mat_dist.export(imported, "safetensors", "out") / "README.md").read_text()
    assert told in card and "| threat | unknown |" in card and "network not confirmed" in card and "cost" not in card


def test_nothing_that_leaves_tells_paths_of_this_machine(run: Path, here: Path) -> None:
    out = mat_dist.export(run, "safetensors", "out")
    for file in out.iterdir():
        assert str(run.parent).encode() not in file.read_bytes() and str(here).encode() not in file.read_bytes()
    settings = json.loads((out / "settings.json").read_text())
    assert settings["attack.steps" if "attack.steps" in settings else "peers.0.attack.steps"] == 1


# ------------------------------------------------------------------ what cannot be done


def refused(error: type[MatError], text: str, run: Path, to: str = "safetensors", out: str = "out",
            **more: Any) -> None:
    """The export raises, and changes nothing: neither here nor in the run."""
    before, run_before = tree_hash(Path()), tree_hash(run) if run.exists() else ""
    with pytest.raises(error, match=text):
        mat_dist.export(run, to, out, **more)
    assert tree_hash(Path()) == before and (tree_hash(run) if run.exists() else "") == run_before


def test_what_cannot_be_exported_is_told_and_leaves_nothing(run: Path, here: Path) -> None:
    refused(ConfigError, "there is no format 'zip' .* choose one of safetensors, hf", run, "zip")
    refused(ConfigError, "there is no run folder", here / "nowhere")
    refused(MatError, "there is no peer 'peer9' .* peer0, peer1, peer2", run, peer="peer9")
    refused(MatError, "there is no checkpoint 'step_999'", run, which="step_999")
    refused(MatError, "there are no weights 'swa'", run, weights="swa")
    refused(ConfigError, "RobustBench has no list for digits and linf 1/10", run, "robustbench")
    refused(ConfigError, "there is no format 'None'", run, None)
    refused(MatError, "there is no peer -1", run, peer=-1)
    (here / "file").touch()
    refused(OutputError, "it cannot be written: .*Not a directory", run, out="file/out")


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_there_is_never_overwritten(kind: str, run: Path, here: Path) -> None:
    out = here / "out"
    {"folder": out.mkdir, "file": out.touch, "link": partial(out.symlink_to, "nothing")}[kind]()
    refused(OutputError, "it is there already, and nothing is overwritten", run)


def test_a_run_that_still_trains_is_not_exported(run: Path, here: Path) -> None:
    told = r"still being written by pid \d+.*wait until it ends"
    with RunLock(RunFolder(run), None), pytest.raises(OutputError, match=told):
        mat_dist.export(run, "safetensors", "out")
    assert not list(here.iterdir())


def test_damaged_weights_do_not_leave(run: Path, here: Path) -> None:
    shutil.copytree(run, "copy")
    for file in Path("copy/checkpoints").glob("step_*/peer_1.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    refused(MatError, "peer_1", here / "copy", peer="ensemble")
    assert mat_dist.export("copy", "safetensors", "x" * 255, peer="peer0").is_dir()


def test_a_run_without_a_checkpoint_is_told_so(here: Path) -> None:
    done = run_small(here, "empty", "train.max_steps=1")
    shutil.rmtree(done.folder.checkpoints)
    done.folder.checkpoints.mkdir()
    refused(MatError, "there is no checkpoint 'latest' .*the run has none yet: train it", done.folder.path)


@pytest.mark.parametrize("to", exporting.FORMATS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_is_cut_off_leaves_nothing(error: BaseException, to: str, run: Path, here: Path, cifar: None,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(one: Any) -> Any:
        (one.folder / "half").write_text("half")
        raise error

    monkeypatch.setitem(exporting.FORMATS, to, cut)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        mat_dist.export(run, to, "deep/out")
    assert [path for path in here.rglob("*") if path.name != "deep"] == []


def test_what_onnxruntime_cannot_run_is_told_so(here: Path) -> None:
    """It has no convolution in fp64."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    one = exporting._Exported(nn.Conv2d(1, 2, 1).double().eval(), torch.rand(3, 1, 2, 2).double(), {}, here)
    with pytest.raises(ConfigError, match=r"has no graph of this form: .*NOT_IMPLEMENTED"):
        exporting._onnx(one)


def test_a_network_without_a_graph_is_told_so(here: Path) -> None:
    class Turns(nn.Module):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            return x_BCHW.flatten(1) if x_BCHW.sum() > 3 else -x_BCHW.flatten(1)

    one = exporting._Exported(Turns(), torch.rand(3, 1, 2, 2), {}, here)
    with pytest.raises(ConfigError, match=r"has no graph of this form: .* choose safetensors"):
        exporting._pt2(one)


def test_an_export_draws_nothing_from_the_generator_of_the_program(run: Path, here: Path) -> None:
    before = torch.get_rng_state()
    mat_dist.export(run, "safetensors", "out", peer="ensemble")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_that_gives_other_logits_does_not_leave(run: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = exporting.save
    monkeypatch.setattr(exporting, "save", lambda state: save({
        name: value * 1.1 if value.is_floating_point() else value for name, value in state.items()}))
    refused(MatError, "what was written gives other logits", run)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(package: str, run: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    refused(EnvironmentFault, rf"{package} .*mat_dist\[export\]", run, "onnx")


def test_the_command_names_what_it_lacks(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([str(run), "out"], [str(run), "--to", "hf"], [str(run), "--to", "hf", "out", "more"]):
        assert main(["export", *words]) == ConfigError.code
        assert "write RUN --to FORMAT OUT" in capsys.readouterr().err
    assert not list(here.iterdir())


# ------------------------------------------------------------------ the hub


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """A hub that writes down what it is asked for."""
    hub, calls = pytest.importorskip("huggingface_hub"), []

    class Fake:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda **more: calls.append((name, more))

    monkeypatch.setattr(hub, "HfApi", Fake)
    yield calls


def test_the_whole_folder_is_pushed_to_a_private_repository(run: Path, here: Path, asked: list) -> None:
    out = mat_dist.export(run, "hf", "out", hub="org/name")
    assert asked == [("create_repo", {"repo_id": "org/name", "private": True, "exist_ok": True}),
                     ("upload_folder", {"repo_id": "org/name", "folder_path": out})]


def test_a_hub_that_does_not_answer_is_told_before_anything_is_written(run: Path, here: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "HfApi", partial(hub.HfApi, endpoint="http://127.0.0.1:9", token="none"))
    refused(EnvironmentFault, r"create_repo: .*refused.* \(--hub org/name\): check the network", run, hub="org/name")


def test_an_upload_that_fails_leaves_a_whole_folder_and_says_how_to_go_on(run: Path, here: Path, images: Tensor,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda self, **more: None)
    monkeypatch.setattr(hub, "HfApi", partial(hub.HfApi, endpoint="http://127.0.0.1:9", token="none"))
    with pytest.raises(EnvironmentFault, match="the folder is complete: hf upload org/name out"):
        mat_dist.export(run, "hf", "out", hub="org/name", peer="peer0")
    assert torch.equal(module_of(here / "out/model.py").load()(images), mat_dist.load(run, "peer0")(images))
