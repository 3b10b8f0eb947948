"""Running a configuration: what is checked first, what a record repeats, what is continued."""

import pytest
from PIL import Image

from dittune import config
from dittune.config import RunConfig
from dittune.errors import ConfigError
from dittune.pipelines import generate
from dittune.pipelines.media import read_record, save_png


def made(saved, out, **settings):
    """Make one image and return its path."""
    run = config.resolve(
        {"model": str(saved), "prompts": ["a"], "seed": 7, "size": "16", "steps": 1, **settings}
    )
    todo = generate.prepare(run, out)
    ((job, _),) = generate.run(run, todo, generate.load(run))
    return job.path


def test_a_later_preset_does_not_change_what_a_record_repeats(saved, tmp_path, monkeypatch):
    path = made(saved, tmp_path)
    content, warnings = generate.recorded(path)
    before = config.resolve(dict(content))
    monkeypatch.setattr(config, "preset", lambda model: {"guidance_scale": 1.5, "size": "32"})
    assert config.resolve(dict(content)) == before and before.guidance_scale is None
    assert config.resolve({}).guidance_scale == 1.5
    assert warnings == []


def test_other_versions_are_told(saved, tmp_path):
    path = made(saved, tmp_path)
    record = read_record(path)
    record["versions"] = {"torch": "0.1", "nosuchpackage": "2"}
    save_png(Image.new("RGB", (8, 8)), path, record)
    torch, other = generate.recorded(path)[1]
    assert "made with torch 0.1, this is" in torch
    assert "made with nosuchpackage 2, this is not installed" in other


@pytest.mark.parametrize("record", [{}, {"prompt": "a"}])
def test_a_record_without_a_configuration(saved, tmp_path, record):
    path = made(saved, tmp_path)
    save_png(Image.new("RGB", (8, 8)), path, record)
    with pytest.raises(ConfigError, match="holds no configuration"):
        generate.recorded(path)
    with pytest.raises(ConfigError, match="choose another --out"):
        made(saved, tmp_path)


def test_a_record_names_a_local_model_without_its_path(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(saved)
    assert read_record(made(".", tmp_path))["config"]["model"] == saved.name
    with pytest.raises(ConfigError, match=f"local model '{saved.name}'; add --model FOLDER"):
        generate.check_recorded_model(saved.name)
    for name in ("some/model", "shapes-sd3", "."):
        generate.check_recorded_model(name)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["a", " "]}, "a prompt is empty"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**63 - 1, "num_images": 2}, "seed must be at most"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"size": "64x"}, "SIDE or WIDTHxHEIGHT"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(tmp_path, settings, match):
    with pytest.raises(ConfigError, match=match):
        generate.prepare(RunConfig(**{"prompts": ["a"], **settings}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_weights_of_the_same_name_are_told_and_not_mixed(model, tmp_path):
    path = made(model, tmp_path)
    assert len(read_record(path)["weights"]) == 12
    assert generate.other_weights(path, str(model)) == []
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "made with other weights" in generate.other_weights(path, str(model))[0]
    with pytest.raises(ConfigError, match="was made with other weights; choose another --out"):
        made(model, tmp_path)
