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
    assert set(document) == {"build-system", "tool"}
    assert set(document["tool"]) == {"ruff"}


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
            source = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
            assert function in {node.name for node in source.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.slow
def test_the_wheel_holds_code_data_licence_and_configs(tmp_path):
    """Built from a copy, without the network, by the setuptools of this environment."""
    pytest.importorskip("setuptools", minversion="64")
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("mat_dist", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import setuptools.build_meta as backend, sys; print(backend.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=copy, check=True, capture_output=True, timeout=100)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    in_package = {str(path.relative_to(ROOT)) for path in (ROOT / "mat_dist").rglob("*")
                  if path.is_file() and "__pycache__" not in path.parts}
    assert {name for name in names if name.startswith("mat_dist/")} == in_package
    shared = {Path(name).name for name in names if ".data/data/share/mat_dist/configs/" in name}
    assert shared == {path.name for path in (ROOT / "configs").iterdir()}
    assert any(name.endswith("licenses/LICENSE") for name in names)
