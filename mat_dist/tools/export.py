"""Write a trained peer or the ensemble for others, with a card that tells how it was made: README.md.

--to FORMAT, each a new folder:
  safetensors, hf  model.safetensors and model.py, which needs torch alone; with huggingface_hub Model.from_pretrained
  robustbench      weights, loader and model_info for RobustBench's model zoo
  torch_export     model.pt2 for torch.export.load
  onnx             model.onnx for onnxruntime and others
"""

from __future__ import annotations

import io
import os
import re
import runpy
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

import mat_dist
from mat_dist.checkpoints.load import BEST, ENSEMBLE, FinishedRun, open_run
from mat_dist.cli import as_main, tell
from mat_dist.config import Options, flat_settings, load_plugins
from mat_dist.errors import ConfigError, EnvironmentFault, MatError, OutputError, optional
from mat_dist.evaluation.results import accuracies, read_results, wilson_interval
from mat_dist.evaluation.settings import find_run, refuse_unfinished
from mat_dist.evaluation.targets import threats_of
from mat_dist.models.registry import DTYPES, parameter_count
from mat_dist.models.robustbench import as_ours
from mat_dist.runs.console import counted
from mat_dist.runs.files import fsync_directory, write_bytes, write_json, write_text
from mat_dist.runs.record import read_environment
from mat_dist.screens import arrived
from mat_dist.tools.dryrun import training_passes
from mat_dist.tools.standalone import definitions

EXTRA = "pip install 'mat_dist[export]'"
_DATA, _THREATS = ("cifar10", "cifar100"), {"linf": "Linf", "l2": "L2"}  # that RobustBench has lists for


@dataclass(frozen=True)
class _Exported:
    """A model, some random images, what the card tells, and the folder that is written."""

    model: nn.Module
    x_BCHW: Tensor
    told: dict[str, Any]
    folder: Path

    def write(self, file: str, template: str, **more: Any) -> None:
        write_text(self.folder / file, filled(template, {**self.told, **more}))

    def state(self) -> dict[str, Tensor]:
        """The weights, each a tensor of its own."""
        return {name: one.clone(memory_format=torch.contiguous_format) for name, one in self.model.state_dict().items()}

    def source(self, weights: str) -> Any:
        """Write model.py, for weights in a file of the folder -> the module that it loads. Raises ConfigError."""
        self.write("model.py", "model.py", weights=weights, dtype=self.x_BCHW.dtype, version=mat_dist.__version__,
                   **definitions([as_ours(spec.model, self.told["images"].classes)[0] for spec in self.told["peers"]],
                                 self.told["rule"] is not None))
        with torch.random.fork_rng(devices=[]):  # Model() draws fresh weights first
            return runpy.run_path(str(self.folder / "model.py"))["load"]()

    def graph(self, use: Callable[[torch.export.ExportedProgram], Any]) -> Any:
        """What `use` makes of the network for batches of any size. Raises ConfigError where that cannot be done."""
        plain = self.model.to(memory_format=torch.contiguous_format)
        try:
            return use(torch.export.export(plain, (self.x_BCHW,), dynamic_shapes=({0: torch.export.Dim("batch")},)))
        except OSError:
            raise
        except Exception as error:
            raise ConfigError(f"the network has no graph of this form: {' '.join(str(error).split())[:200]}", "--to",
                              "choose safetensors") from error


def _weights(one: _Exported) -> Any:
    write_bytes(one.folder / "model.safetensors", save(one.state()))
    write_json(one.folder / "config.json", {"architectures": [spec.model.name for spec in one.told["peers"]]})
    return one.source("model.safetensors")


def _zoo(one: _Exported) -> Any:
    data, threats = one.told["config"].data.name, one.told["threats"]
    threat = next((threat for threat in threats if threat.norm in _THREATS), None)
    if data not in _DATA or threat is None:
        raise ConfigError(f"RobustBench has no list for {data} and {', '.join(one.label for one in threats)}", "--to",
                          f"its data are {', '.join(_DATA)}, its norms {', '.join(_THREATS)}; choose safetensors")
    name = re.sub(r"[^a-zA-Z0-9]+", "_", f"{one.told['run']}_{one.told['target']}")
    place = f"{data}/{_THREATS[threat.norm]}/{name}"
    for kind in ("models", "model_info"):
        (one.folder / kind / place).parent.mkdir(parents=True)
    torch.save(one.state(), buffer := io.BytesIO())
    write_bytes(one.folder / f"models/{place}.pt", buffer.getbuffer())
    one.write(f"model_info/{place}.json", "model_info.json", threat=threat)
    one.write("robustbench_loader.py", "robustbench_loader.py", place=place.split("/"))
    return one.source(f"models/{place}.pt")


def _pt2(one: _Exported) -> Any:
    one.graph(partial(torch.export.save, f=(buffer := io.BytesIO())))
    write_bytes(one.folder / "model.pt2", buffer.getbuffer())
    return torch.export.load(one.folder / "model.pt2").module()


def _onnx(one: _Exported) -> Any:
    runtime = [optional(package, "--to onnx", EXTRA) for package in ("onnx", "onnxscript", "onnxruntime")][-1]
    file, size = one.folder / "model.onnx", sum(value.nbytes for value in one.model.state_dict().values())
    def translated(graph: torch.export.ExportedProgram) -> Any:
        torch.onnx.export(graph, f=file, input_names=["images"], output_names=["logits"], verbose=False,
                          external_data=size > 1 << 30)  # a file of this kind holds 2 GiB at most
        return runtime.InferenceSession(file, providers=["CPUExecutionProvider"])  # it has not every operator in fp64
    session = one.graph(translated)
    return lambda x_BCHW: torch.from_numpy(session.run(None, {"images": x_BCHW.numpy()})[0])


FORMATS = {"safetensors": _weights, "hf": _weights, "robustbench": _zoo, "torch_export": _pt2, "onnx": _onnx}


def export(run: str | Path, to: str, out: str | Path, *, peer: str | int = BEST, which: str = BEST,
           weights: str | None = None, licence: str = "unknown", hub: str | None = None) -> Path:
    """Write a model of a finished run into the new folder `out`, and return that. All of it is written, or nothing.

    Args: run, peer, which and weights as for `mat_dist.load`; `to` is one of FORMATS; `licence` of the weights, such as
    mit, stands in the card; `hub` is ORG/NAME on the Hugging Face hub, where the folder is pushed to.
    Raises MatError: the run still trains or has no such checkpoint, the folder exists, a package is missing, the hub
    does not answer, or the network cannot be written in this form.
    """
    out = Path(out)
    if to not in FORMATS:
        raise ConfigError(f"there is no format {str(to)[:40]!r}", "--to", f"choose one of {', '.join(FORMATS)}")
    if os.path.lexists(out):
        raise OutputError("it is there already, and nothing is overwritten", str(out), "choose another folder")
    refuse_unfinished(find_run(str(run)))
    opened = open_run(run, which, weights)
    target = ENSEMBLE if peer == ENSEMBLE else opened.peers[opened.index(peer)]
    model = opened.ensemble() if peer == ENSEMBLE else opened.peer(target)
    x_BCHW = torch.rand(3, *opened.images.shape, generator=torch.Generator().manual_seed(0),
                        dtype=DTYPES[opened.config.step.precision])
    if hub is not None:  # before anything is written: it may not answer
        _ask_hub(hub, "create_repo", "check the network, ORG/NAME and `hf auth login`, or leave --hub out",
                 private=True, exist_ok=True)
    told = facts(opened, target)
    with _whole(out) as folder:
        one = _Exported(model, x_BCHW, told, folder)
        one.write("README.md", "card.md", to=to, licence=licence, parameters=parameter_count(model),
                  checked=_checked(one, FORMATS[to](one)))
        write_json(folder / "settings.json", {key: value for key, value in flat_settings(opened.config).items()
                                              if not str(value).startswith("/")})  # all paths are absolute there
    if hub is not None:
        _ask_hub(hub, "upload_folder", f"the folder is complete: hf upload {hub} {out}", folder_path=out)
    return out


# ------------------------------------------------------------------------------------------------ the card


def filled(template: str, values: dict[str, Any]) -> str:
    """The text of a template of this folder."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(loader=PackageLoader("mat_dist.tools"), undefined=StrictUndefined, trim_blocks=True,
                       lstrip_blocks=True, keep_trailing_newline=True)
    made.filters["counted"] = counted
    return made.get_template(f"{template}.j2").render(values, accuracies=accuracies, wilson=wilson_interval)


def facts(opened: FinishedRun, target: str) -> dict[str, Any]:
    """What the templates show of a peer or the ensemble; `results` are the evaluations of this checkpoint, the newest
    last. Raises NotReportable for a damaged result file."""
    config, step = opened.config, opened.manifest.step
    rule = config.eval.ensemble if target == ENSEMBLE else None
    peers = [spec for spec in config.peers if (spec.name == target if rule is None else not spec.frozen)]
    digests = {file.name: file.sha256 for file in opened.manifest.files}
    results = {(result.split, one.n, *result.named_attacks(), *one.accuracy.items()): (result, one)  # best may be last
               for result in read_results(opened.folder.eval, "*") for one in result.targets
               if result.step == step and result.files in ({}, digests)
               and one.target in (target, f"{ENSEMBLE}:{rule}") and one.weights == opened.weights}
    return {"config": config, "peers": peers, "threats": threats_of(peers), "images": opened.images, "target": target,
            "rule": rule, "step": step, "weights_kind": opened.weights, "results": list(results.values()),
            "run": opened.folder.path.resolve().name, "cost": training_passes(config, step) or (0, 0, 0),
            "made": read_environment(opened.folder) or {}, "imported": "imported" in opened.manifest.meta.extra}


# ------------------------------------------------------------------------------------------------ what is written


def _checked(one: _Exported, loaded: Any) -> tuple[float, float]:
    """The largest logit, and how far those of what was written differ at most. Raises MatError where it is too far."""
    with torch.no_grad():
        own = one.model(one.x_BCHW)
        largest, found = own.abs().max().item(), (own - loaded(one.x_BCHW)).abs().max().item()
    if not found <= 1e-4 * largest + 1e-6:
        raise MatError(f"what was written gives other logits, by {found:g} of {largest:g}", one.told["target"],
                       "choose another format, and please report it")
    return largest, found


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder beside `out`, which gets its name at the end; after an exception nothing stays."""
    folder = out.with_name(f".export.{secrets.token_hex(4)}")
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.rename(out)
        fsync_directory(out.parent)
    except (OSError, OutputError) as error:
        what = f"it cannot be written: {getattr(error, 'what', error)}"
        raise OutputError(what, str(out), "choose a place with room where you may write") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _ask_hub(hub: str, what: str, how: str, **more: Any) -> None:
    api = optional("huggingface_hub", f"--hub {hub}", EXTRA).HfApi()
    try:
        getattr(api, what)(repo_id=hub, **more)
    except Exception as error:
        raise EnvironmentFault(f"no {what}: {' '.join(str(error).split())[:300]}", f"--hub {hub}", how) from error


def _command(words: Sequence[str]) -> None:
    options = Options("export", __doc__, "RUN --to FORMAT OUT")
    options.prog = "python -m mat_dist export"  # mat_dist.export is the function
    for default, name, metavar, text in (
            (None, "to", "FORMAT", "the form"), (BEST, "peer", "PEER", "its name, ensemble, or best (the default)"),
            (BEST, "which", "STEP", "checkpoint best (the default), latest, or step_N"),
            (None, "weights", "KIND", "raw or ema; default ema where the run keeps averaged weights"),
            ("unknown", "licence", "ID", "of the weights, such as mit; it stands in the card"),
            (None, "hub", "ORG/NAME", "push the folder to the Hugging Face hub; a new one there is private")):
        options.add_argument(f"--{name}", metavar=metavar, default=default, help=text)
    options.add_plugin()
    found = vars(options.read(words))
    places, to = found.pop("words"), found.pop("to")
    load_plugins(found.pop("plugin"))
    if len(places) != 2 or to is None:
        raise ConfigError("it takes a run, a format and a new folder", "command line",
                          "write RUN --to FORMAT OUT, for instance runs/first --to safetensors exported")
    tell(f"export of {found['peer']} of {places[0]} as {to} to {places[1]}")
    export(places[0], to, places[1], **found)
    tell("done: loaded again, it gives the same logits; README.md in it is its card")
    arrived()


main = as_main(_command)
