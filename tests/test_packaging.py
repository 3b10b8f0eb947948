"""The wheel: one top-level name, samples and checkpoints inside, an image in a clean folder."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("dittune", "kernels", "pipelines", "samples")


def test_every_folder_with_code_is_listed():
    listed = re.findall(r'^  "(dittune[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.M)
    folders = [path.parent for name in FOLDERS for path in (ROOT / name).rglob("*.py")]
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    wanted = {name if name.startswith("dittune") else f"dittune.{name}" for name in packages}
    assert wanted - set(listed) == set()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: what an earlier build has left behind must not get into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(source)]
    if importlib.util.find_spec("setuptools"):
        command.append("--no-isolation")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dittune"}
    checkpoint = "dittune/samples/checkpoints/shapes-sd3/"
    modules = {
        ("dittune/" if folder != "dittune" else "") + path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    assert modules == {name for name in names if name.endswith(".py")}
    for wanted in (
        "dittune/py.typed",
        "dittune/pipelines/cli.py",
        "dittune/samples/shapes/world.py",
        checkpoint + "model_index.json",
        checkpoint + "transformer/diffusion_pytorch_model.safetensors",
        "dittune/samples/presets/shapes-sd3.yaml",
    ):
        assert wanted in names
    assert wheel.stat().st_size < 64 * 2**20


@pytest.mark.slow
def test_the_wheel_runs(wheel, tmp_path):
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    environment = {"PYTHONPATH": str(target), "PATH": "", "HF_HUB_OFFLINE": "1"}

    def dittune(*arguments):
        code = "from dittune.pipelines.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    made = dittune("generate", "a red circle", "--seed", "1", "--steps", "2")
    assert (tmp_path / made.strip()).is_file()
    methods = (ROOT / "dittune" / "methods").glob("*.py")
    listed = {method["name"] for method in json.loads(dittune("methods", "--json"))}
    assert listed == {path.stem for path in methods} - {"__init__"}
