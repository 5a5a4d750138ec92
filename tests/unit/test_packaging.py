"""Metadata, licence, citation, and what a built wheel holds."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from ruamel.yaml import YAML

import mat_dist

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirement_names(text: str) -> set[str]:
    return {re.split(r"[<>=]", line)[0].strip().lower() for line in text.split() if line}


def test_pyproject_holds_only_what_setup_cfg_cannot():
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(document) == {"build-system", "project", "tool"}
    assert set(document["project"]) == {"name", "requires-python", "dynamic"}  # uv needs them; the rest is in setup.cfg
    assert set(document["tool"]) == {"ruff", "uv"}


def test_the_lock_file_is_that_of_setup_cfg_and_names_public_addresses_only(setup_cfg):
    """Whether `uv sync --locked` would take it, without uv."""
    text = (ROOT / "uv.lock").read_text()
    assert {urlsplit(address).netloc for address in re.findall(r'"(\w+://[^"]*)"', text)} == {
        "pypi.org", "files.pythonhosted.org"}
    lock = tomllib.loads(text)
    assert lock["requires-python"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    (ours,) = (package["metadata"] for package in lock["package"] if package["name"] == "mat-dist")
    extras = setup_cfg["options.extras_require"]
    asked = {"": setup_cfg["options"]["install_requires"], **extras}
    wanted = {(extra, normal(line)) for extra, lines in asked.items() for line in lines.split("\n") if line}
    locked = {("".join(re.findall(r"extra == '(\w+)'", one.get("marker", ""))),
               normal(one["name"] + one.get("specifier", ""))) for one in ours["requires-dist"]}
    assert locked == wanted and set(ours["provides-extras"]) == set(extras), "run: uv lock (pip install uv)"


def normal(requirement: str) -> str:
    """One spelling for equal requirements: huggingface_hub is huggingface-hub, and commas have no order."""
    name, bounds = re.fullmatch(r"([\w.-]+)(.*)", requirement.replace(" ", "")).groups()
    return re.sub(r"[._-]+", "-", name.lower()) + ",".join(sorted(bounds.split(",")))


def test_citation_and_changelog_name_the_version_of_the_package():
    citation = YAML(typ="safe", pure=True).load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == mat_dist.__version__
    assert f"({mat_dist.__version__})" in (ROOT / "CHANGELOG.md").read_text()
    paper = citation["references"][0]
    assert [author["family-names"] for author in paper["authors"]] == ["Liu", "Lau", "Souri", "Feizi", "Chellappa"]
    assert (paper["volume"], paper["start"], paper["end"], paper["year"]) == (17, 2364, 2377, 2022)


def test_every_third_party_import_is_a_declared_dependency(setup_cfg):
    # import name: the requirement that it comes with (torchvision needs Pillow)
    packages = {"ruamel": "ruamel.yaml", "PIL": "torchvision", "pydantic_core": "pydantic",
                "markupsafe": "jinja2"}
    core = requirement_names(setup_cfg["options"]["install_requires"])
    extras = set().union(*(requirement_names(text) for text in setup_cfg["options.extras_require"].values()))
    for path in (ROOT / "mat_dist").rglob("*.py"):
        tree = ast.parse(path.read_text())
        at_import = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"mat_dist"}:
                allowed = core if id(node) in at_import else core | extras
                assert packages.get(name, name.lower()) in allowed, f"{path.name}:{node.lineno} imports {name}"


def test_each_command_is_a_function_of_the_package(setup_cfg):
    for line in setup_cfg["options.entry_points"]["console_scripts"].split("\n"):
        if line.strip():
            module, function = line.split("=")[1].strip().split(":")
            assert callable(getattr(importlib.import_module(module), function))


BUILD = """
import os, setuptools.build_meta as backend, sys, tarfile
out = sys.argv[1]
with tarfile.open(f"{out}/{backend.build_sdist(out)}") as archive:
    archive.extractall(out, filter="data")
    os.chdir(f"{out}/{archive.getnames()[0]}")
backend.build_wheel(out)
"""


@pytest.mark.slow
def test_a_wheel_built_of_the_sdist_holds_all_and_works_where_it_is_installed(tmp_path):
    """Built from a copy, without the network, by the setuptools of this environment."""
    pytest.importorskip("setuptools", minversion="64")
    pytest.importorskip("pip")
    copy, out, there = (tmp_path / name for name in ("source", "out", "there"))
    copy.mkdir()
    out.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("mat_dist", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=copy, check=True, capture_output=True, timeout=100)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    in_package = {str(path.relative_to(ROOT)) for path in (ROOT / "mat_dist").rglob("*")
                  if path.is_file() and "__pycache__" not in path.parts}
    assert {name for name in names if name.startswith("mat_dist/")} == in_package
    shared = {Path(name).name for name in names if ".data/data/share/mat_dist/configs/" in name}
    assert shared == {path.name for path in (ROOT / "configs").iterdir()}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert f"Version: {mat_dist.__version__}\n" in metadata and "Requires-Python: >=3.11\n" in metadata
    subprocess.run([sys.executable, "-m", "pip", "--isolated", "install", "--quiet", "--no-deps", "--no-index",
                    "--target", str(there), str(wheel)], check=True, timeout=100)
    look = ("import sys; sys.path.insert(0, sys.argv[1]); import importlib.metadata as m, mat_dist;"
            "found = [e.load() for e in m.distribution('mat_dist').entry_points]; print(mat_dist.__file__, len(found))")
    told = subprocess.run([sys.executable, "-I", "-c", look, str(there)], cwd=tmp_path, check=True, capture_output=True,
                          text=True, timeout=100).stdout.split()
    assert told == [str(there / "mat_dist" / "__init__.py"), "5"]
    assert {path.name for path in (there / "bin").iterdir()} == {"mat-dist", "mat-dist-train", "mat-dist-check",
                                                                 "mat-dist-evaluate"}
