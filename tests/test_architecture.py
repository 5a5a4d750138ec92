"""The shape of the package: who imports whom, who may talk to other ranks, sizes, what is never used."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from mat_dist.config.methods import attack_methods, presets, strategies

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mat_dist"

# A unit is a file or folder of mat_dist/. It imports only from units in rows above its own.
ROWS = (
    ("errors", "rng"),
    ("screens",),
    ("config",),
    ("distributed",),
    ("cli",),
    ("runs",),
    ("models", "data"),
    ("attacks",),
    ("checkpoints",),
    ("core",),
    ("methods",),
    ("training",),
    ("evaluation",),
    ("report", "tools"),
    ("api",),
    ("train", "evaluate", "check", "table", "hashes", "__init__"),
    ("__main__",),
)
ROW = {unit: row for row, units in enumerate(ROWS) for unit in units}
LAUNCHER_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
OBJECT_READERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MOST_FUNCTION_LINES = 60
CORE = PACKAGE / "core"
MOST_CORE_FILES, MOST_CORE_LINES, MOST_STEP_LINES = 12, 250, 150
# Methods that the core may not name, beside the presets and strategies of mat_dist/methods/.
PUBLISHED = {"trades", "mart", "awp", "ramp", "free_at", "free-at", "cat", "lbgat", "peeraid", "ard", "rslad", "msd",
             "eat", "e-at", "sat", "swa", "alp", "iad", "atta", "fgsm", "n_fgsm", "n-fgsm", "madry", "dml", "cutmix",
             "idbh", "mtard", "croce", "hinton", "tramer", "wong", "kannan", "zhang"}
ENGLISH = {"mat", "at", "avg", "max", "random", "free"}  # and the package's own name
AUTHORS_IN = {"losses.py", "optim.py", "monitor.py"}  # where a formula's source, its authors and venue, is stated
AUTHORS = {"madry", "croce", "hinton", "tramer", "wong", "kannan", "zhang"}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def walked(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree(path)))


def nodes(*skipped: str) -> Iterator[tuple[str, ast.AST]]:
    """All syntax nodes of the package but those of `skipped` units, each with its `file:line`."""
    for path in FILES:
        if unit_of(path) not in skipped:
            file = path.relative_to(ROOT)
            for node in walked(path):
                yield f"{file}:{getattr(node, 'lineno', 0)}", node


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def units() -> frozenset[str]:
    return frozenset(unit_of(path) for path in FILES)


def imported_names(node: ast.AST) -> list[str]:
    """Dotted names that an import statement asks for, `from a import b` as a.b; relative ones begin with a dot."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return ["." * node.level + f"{node.module or ''}.{alias.name}".lstrip(".") for alias in node.names]
    return []


def imported_units(path: Path) -> Iterator[str]:
    """Units of mat_dist that the file imports, wherever in the file; `mat_dist.__version__` is free."""
    for node in walked(path):
        for name in imported_names(node):
            parts = name.split(".")
            if parts[0] == "mat_dist" and name not in ("mat_dist", "mat_dist.__version__"):
                yield parts[1] if parts[1] in units() else "__init__"


@cache
def graph() -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {unit: set() for unit in units()}
    for path in FILES:
        found[unit_of(path)] |= set(imported_units(path)) - {unit_of(path)}
    return {unit: frozenset(targets) for unit, targets in found.items()}


@pytest.mark.parametrize("unit", sorted(units()))
def test_a_unit_imports_only_from_rows_above_its_own(unit):
    assert unit in ROW, f"give {unit} a row in {Path(__file__).name}"
    wrong = {target for target in graph()[unit] if ROW[target] >= ROW[unit]}
    assert not wrong, f"{unit} must not import {sorted(wrong)}, see ROWS in {Path(__file__).name}"


def test_only_distributed_touches_torch_distributed_and_launcher_variables():
    wrong = []
    for where, node in nodes("distributed"):
        wrong += [f"{where} imports {name}" for name in imported_names(node)
                  if name.startswith(("torch.distributed", "torch.multiprocessing"))]
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            wrong.append(f"{where} uses torch.distributed")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in LAUNCHER_VARIABLES:
            wrong.append(f"{where} names {node.value}")
    assert not wrong


# ------------------------------------------------------------------------------------------------ the core


def test_the_core_is_a_dozen_files_that_each_fit_one_sitting():
    lines = {path.name: path.read_text().count("\n") for path in CORE.glob("*.py")}
    assert len(lines) <= MOST_CORE_FILES and not list(CORE.glob("*/*.py"))
    assert not {name: count for name, count in lines.items() if count > MOST_CORE_LINES}


def test_the_core_names_no_method():
    """In code, comments and strings; `torch.cat` is no method."""
    named = {*PUBLISHED, *presets(), *strategies(), *attack_methods()} - ENGLISH - {"pgd", "apgd"}
    wrong = []
    for path in sorted(CORE.glob("*.py")):
        words = named - (AUTHORS if path.name in AUTHORS_IN else set())
        pattern = re.compile(rf"(?<![\w.-])({'|'.join(sorted(map(re.escape, words)))})(?![\w-])", re.IGNORECASE)
        wrong += [f"{path.name}:{number} {found}" for number, line in enumerate(path.read_text().splitlines(), 1)
                  for found in pattern.findall(line)]
    assert not wrong


def test_only_a_string_of_the_settings_leads_to_the_methods():
    """Deleting a file of mat_dist/methods/ breaks nothing, because nothing below names one."""
    below = [unit for unit in units() if ROW[unit] < ROW["methods"]]
    assert not [unit for unit in below if "methods" in graph()[unit]]
    spoken = {where.partition(":")[0] for where, node in nodes(*(units() - set(below)))
              if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value
              and re.match(r"mat_dist[./]methods", node.value)}
    assert spoken == {"mat_dist/config/methods.py"}


def test_a_step_fits_one_screen():
    """`train_step` and all that it calls in its file, whatever it is called through."""
    file = tree(CORE / "step.py")
    known = {node.name: node for node in file.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    reached: set[str] = set()
    waiting = ["train_step"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting += {node.id for node in ast.walk(known[name]) if isinstance(node, ast.Name)} & set(known) - reached
    functions = [known[name] for name in reached if isinstance(known[name], ast.FunctionDef)]
    assert {"train_step", "learn", "told_at_vote"} <= reached
    assert sum(node.end_lineno - node.lineno + 1 for node in functions) < MOST_STEP_LINES


# ------------------------------------------------------------------------------------------------ all files


def test_imports_are_absolute_and_name_what_they_take():
    assert not [f"{where} {name}" for where, node in nodes() for name in imported_names(node)
                if name.startswith(".") or name.endswith("*")]


def test_functions_stay_short():
    functions = {f"{where} {node.name}": node.end_lineno - node.lineno + 1 for where, node in nodes()
                 if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert not {name: lines for name, lines in functions.items() if lines > MOST_FUNCTION_LINES}


def _unsafe(node: ast.AST) -> str | None:
    """What is wrong with `node`, if anything: code that turns bytes or text into running code, or hides errors."""
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        return "bare except"
    if not isinstance(node, ast.Call):
        return None
    called = ast.unparse(node.func)
    if called in ("eval", "exec", "compile", "os.system", "os.popen", "torch.hub.load"):
        return called
    if called in ("YAML", "yaml.YAML") and ast.unparse(node.keywords[0]) != "typ='safe'":
        return called
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if (keyword.arg, value) in (("weights_only", False), ("allow_pickle", True), ("shell", True)):
            return f"{keyword.arg}={value}"
    return None


def test_nothing_read_from_a_file_can_run_code():
    problems = [f"{where} {problem}" for where, node in nodes() if (problem := _unsafe(node))]
    problems += [f"{where} imports {name}" for where, node in nodes() for name in imported_names(node)
                 if name.split(".")[0] in OBJECT_READERS]
    assert not problems


# Runs in its own process, in an empty folder that is also home and temporary folder. A use of sys.argv counts when
# the nearest frame outside the standard library is ours: third-party packages may look at it.
IMPORTER = '''
import importlib, json, logging, sys, sysconfig, threading
package, names = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, package)
standard = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib"))
uses = []

class Arguments(list):
    def _seen(self):
        frame = sys._getframe(2)
        while frame:
            file = frame.f_code.co_filename
            if "site-packages" in file or not file.startswith(standard + ("<frozen",)):
                if file.startswith(package):
                    uses.append(f"{file}:{frame.f_lineno}")
                return
            frame = frame.f_back
    def __getitem__(self, index):
        self._seen()
        return super().__getitem__(index)
    def __iter__(self):
        self._seen()
        return super().__iter__()
    def __len__(self):
        self._seen()
        return super().__len__()

import torch
sys.argv = Arguments(["program", "--no-such-option"])
handlers, seed = list(logging.getLogger().handlers), torch.initial_seed()
for name in names:
    importlib.import_module(name)
import os
print(json.dumps({"argv": uses, "cuda": torch.cuda.is_initialized(), "group": torch.distributed.is_initialized(),
                  "handlers": logging.getLogger().handlers != handlers, "seed": torch.initial_seed() != seed,
                  "threads": [t.name for t in threading.enumerate() if t is not threading.main_thread()],
                  "files": [os.path.join(d, f) for d, _, fs in os.walk(".") for f in fs]}))
'''


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.slow  # a Python process with torch for every module
def test_importing_any_module_does_nothing_else(tmp_path):
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    names = json.dumps([module_name(path) for path in FILES])
    done = subprocess.run([sys.executable, "-c", IMPORTER, str(ROOT), names],
                          cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"argv": [], "cuda": False, "group": False, "handlers": False, "seed": False,
                                       "threads": [], "files": []}
    assert done.stderr == ""
