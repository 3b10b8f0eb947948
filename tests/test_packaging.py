"""The wheel: one top-level name, samples and checkpoints inside, an image in a clean folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dittune"}
    checkpoint = "dittune/samples/checkpoints/shapes-sd3/"
    for wanted in (
        "dittune/pipelines/cli.py",
        "dittune/samples/shapes/world.py",
        checkpoint + "model_index.json",
        checkpoint + "transformer/diffusion_pytorch_model.safetensors",
        "dittune/samples/presets/shapes-sd3.yaml",
    ):
        assert wanted in names
    assert wheel.stat().st_size < 64 * 2**20


def test_the_wheel_generates(wheel, tmp_path):
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    code = "from dittune.pipelines.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "generate",
        "a red circle",
        "--seed",
        "1",
        "--steps",
        "2",
    ]
    environment = {"PYTHONPATH": str(target), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / done.stdout.strip()).is_file()
