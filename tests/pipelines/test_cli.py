"""The command line as people use it, and misuse it."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from dittune.pipelines import cli
from dittune.pipelines.media import grid, read_record

FAST = ["--steps", "2", "--size", "32", "--seed", "7"]


@pytest.fixture
def dittune(capsys):
    """Run the command in this process: (exit code, standard output, standard error)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


@pytest.fixture
def generate(dittune, saved, tmp_path):
    def run(*arguments, out="out"):
        place = ["--model", saved, "--out", tmp_path / out]
        return dittune("generate", *FAST, *place, *arguments)

    return run


def pictures(folder):
    return sorted(folder.glob("*.png"))


def test_an_image_and_its_repetition_bit_for_bit(dittune, generate, saved, tmp_path):
    settings = ["--method", "softpag", "--set", "softpag.heads=0:1,1:0", "--set", "softpag.u=0.5"]
    code, out, _ = generate("a red circle", *settings)
    path = tmp_path / "out" / "0000-a-red-circle-7.png"
    assert code == 0 and out.strip() == str(path)
    record = read_record(path)
    assert record["config"]["methods"]["softpag"]["heads"] == "0:1,1:0"
    assert record["config"]["model"] == "tiny-sd3"  # no local path
    code, _, _ = dittune("generate", "--from", path, "--model", saved, "--out", tmp_path / "again")
    assert code == 0
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    generate("a red circle", out="plain")
    assert (tmp_path / "plain" / path.name).read_bytes() != path.read_bytes()


def test_a_stopped_batch_continues_and_other_settings_do_not_mix(generate, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na = b, \"c\" ${d}: 'e'\n", encoding="utf-8")
    batch = ["--prompts-file", prompts, "--num-images", "2"]
    assert generate(*batch)[0] == 0
    made = pictures(tmp_path / "out")
    assert [read_record(p)["prompt"] for p in made[2:]] == ["a = b, \"c\" ${d}: 'e'"] * 2
    before = {path: path.read_bytes() for path in made}
    stamp = made[0].stat().st_mtime_ns
    made[1].unlink()
    made[3].unlink()
    code, out, err = generate(*batch)
    assert code == 0 and out.split() == [str(made[1]), str(made[3])]
    assert "2 of 4 images are there already" in err
    assert {path: path.read_bytes() for path in made} == before
    assert made[0].stat().st_mtime_ns == stamp
    code, _, err = generate(*batch, "--guidance-scale", "2")
    assert code == 2 and "made with other settings; choose another --out" in err


def test_a_kill_leaves_only_whole_pictures(generate, tmp_path, monkeypatch):
    save, calls = Image.Image.save, []

    def die(self, path, **settings):
        calls.append(path)
        save(self, path, **settings)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", die)
    code, _, err = generate("a red circle", "--num-images", "3")
    assert code == 130 and "run the same command again" in err
    assert len(list((tmp_path / "out").iterdir())) == 1
    monkeypatch.undo()
    assert generate("a red circle", "--num-images", "3")[0] == 0
    assert len(pictures(tmp_path / "out")) == 3


def test_json_is_one_document_and_alone_on_standard_output(saved, tmp_path):
    command = [sys.executable, "-c", "from dittune.pipelines.cli import main; main()"]
    command += [
        "generate",
        "a red circle",
        "--model",
        saved,
        "--out",
        tmp_path / "o",
        "--json",
        *FAST,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["images"][0]["seed"] == 7 and document["skipped"] == 0
    assert document["images"][0]["seconds"] > 0


def test_a_seed_is_drawn_told_and_stored(dittune, saved, tmp_path):
    arguments = [
        "a red circle",
        "--model",
        saved,
        "--out",
        tmp_path,
        "--steps",
        "1",
        "--size",
        "16",
    ]
    code, out, err = dittune("generate", *arguments)
    seed = read_record(out.strip())["seed"]
    assert code == 0 and f"seed {seed}" in err


def test_dry_run_writes_nothing(generate, tmp_path):
    code, out, _ = generate("a red circle", "--dry-run")
    assert code == 0 and "seed: 7" in out and not (tmp_path / "out").exists()
    code, out, _ = generate("a red circle", "--dry-run", "--json")
    assert json.loads(out)["prompts"] == ["a red circle"]


def test_lists(dittune, saved):
    assert "softpag" in dittune("methods")[1]
    listed = {m["name"]: m["settings"] for m in json.loads(dittune("methods", "--json")[1])}
    assert listed["softpag"]["u"] == 1.0
    listed = dittune("models")[1]
    assert all(family in listed for family in ("sd3", "flux", "unet"))
    assert all(f"{name}Model" in listed for name in ("SD3Transformer2D", "UNet2DCondition"))
    sites = json.loads(dittune("models", saved, "--layers", "--json")[1])
    assert [site["layer"] for site in sites] == [0, 1, 2]
    assert [site["stage"] for site in sites] == [0, 0, 0]


def test_config_show_and_validate(dittune, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 4\nmethods: {softpag: {heads: '2:1'}}\n")
    code, out, _ = dittune("config", "show", path, "--set", "softpag.u=0.25")
    assert code == 0 and "u: 0.25" in out
    assert dittune("config", "validate", path)[0] == 0
    assert json.loads(dittune("config", "show", path, "--json")[1])["steps"] == 4
    for wrong, says in (
        ("stepps: 4", "did you mean 'steps'"), ("steps: -5", "steps must be at least 1"),
        ("size: abc", "SIDE or WIDTHxHEIGHT"), ("dtype: foo", "unknown dtype"),
        ("model: nonesuch", "nonesuch"),
    ):  # fmt: skip
        path.write_text(wrong + "\n")
        code, out, err = dittune("config", "validate", path)
        assert code == 2 and not out and says in err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["a red circle", "--method", "softpug"], "did you mean 'softpag'"),
        (["a red circle", "--method", "softpag", "--set", "softpag.v=1"], "no setting 'v'"),
        (["a red circle", "--method", "softpag", "--set", "softpag.u=x"], "type float"),
        (["a red circle", "--method", "softpag", "--set", "softpag.heads=9:0"], "layers 0 to 2"),
        (["a red circle", "--method", "softpag", "--set", "softpag.heads=0:9"], "heads 0 to 1"),
        (["a red circle", "--size", "33"], "multiple of 8"),
        (["a red circle", "--size", "big"], "SIDE or WIDTHxHEIGHT"),
        (["a red circle", "--num-images", "0"], "num_images must be at least 1"),
        (["a red circle", "--dtype", "int8"], "unknown dtype"),
        (["a red circle", "--device", "tpu9"], "device 'tpu9'"),
        (["a red circle", "--config", "none.yaml"], "none.yaml"),
        (["a red circle", "--from", "none.png"], "cannot read picture"),
        (["a red circle", "--steps", "many"], "valid integer"),
        (["a red circle", "--bogus"], "bogus"),
        ([], "no prompt"),
        (["  "], "a prompt is empty"),
        (["--prompts-file", "none.txt"], "cannot read prompts"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(generate, tmp_path, arguments, match):
    code, out, err = generate(*arguments)
    assert code == 2 and not out
    (line,) = [line for line in err.splitlines() if line]
    assert line.startswith("error: ") and match in line
    assert not pictures(tmp_path / "out")


def test_bad_models_and_folders(dittune, saved, tmp_path):
    def fails(match, *arguments):
        code, out, err = dittune("generate", "a red circle", *FAST, *arguments)
        assert code == 2 and not out and match in err and err.startswith("error: ")

    fails("no bundled checkpoint", "--model", "shapes-sd9", "--out", tmp_path)
    (tmp_path / "file").write_text("in the way")
    fails("cannot write to", "--model", saved, "--out", tmp_path / "file" / "folder")
    (tmp_path / "empty.txt").write_text("\n\n")
    code, _, err = dittune("generate", "--prompts-file", tmp_path / "empty.txt", "--model", saved)
    assert code == 2 and "no prompt" in err
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.png")
    fails("carries no dittune record", "--from", tmp_path / "bare.png")


def test_damaged_models_and_too_little_memory_are_one_line(dittune, model, tmp_path, monkeypatch):
    def fails(match):
        out = tmp_path / "out"
        arguments = ["--model", model, "--size", "16", "--steps", "1", "--out", out]
        code, printed, err = dittune("generate", "a red circle", *arguments)
        (line,) = err.splitlines()  # not even the seed that was drawn comes before it
        assert code == 2 and not printed and line.startswith("error: ") and match in line
        assert not pictures(out)

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion3Pipeline, "encode_prompt", no_memory)
        fails("out of memory; lower the number of images")
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    fails("is truncated or damaged")
    weights.write_bytes(whole)
    weights.rename(weights.with_suffix(".bin"))
    fails("is a pickle")


@pytest.mark.parametrize(
    "prompt", ["\\\\${y}", "${", "${oc.env:HOME}", "1e100", "2:1", "null", "'\""]
)
def test_awkward_prompts_survive_the_command_line_and_yaml(dittune, tmp_path, prompt):
    code, out, _ = dittune("generate", prompt, "--dry-run")
    assert code == 0
    path = tmp_path / "run.yaml"
    path.write_text(out, encoding="utf-8")
    assert json.loads(dittune("config", "show", path, "--json")[1])["prompts"] == [prompt]


def test_a_method_that_is_no_name(dittune, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("methods: {mine: {method: 5}}\n")
    code, _, err = dittune("config", "validate", path)
    assert code == 2 and err == "error: method mine: method is the name of one, got 5\n"


def test_without_a_command_there_is_help_and_no_empty_error(dittune):
    code, out, err = dittune()
    assert code == 2 and "generate" in out + err and "error:" not in err


def test_grid_places_pictures_and_labels():
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    sheet = grid([red, blue, blue], columns=2, labels=["a", "b", "c" * 99])
    assert sheet.size == (2 * (16 + 4), 2 * (16 + 30 + 4))
    assert sheet.getpixel((5, 40)) == (255, 0, 0) and sheet.getpixel((30, 40)) == (0, 0, 255)


def test_a_picture_without_its_maps_gets_them(generate, tmp_path):
    generate("a red circle")
    (path,) = pictures(tmp_path / "out")
    plain = path.read_bytes()
    code, out, _ = generate("a red circle", "--show-maps")
    assert code == 0 and out.strip() == str(path) and path.read_bytes() == plain
    assert [p.name for p in pictures(tmp_path / "out")] == [f"{path.stem}-maps.png", path.name]
    code, out, err = generate("a red circle", "--show-maps")
    assert code == 0 and not out and "1 of 1 images are there already" in err


def test_a_drawn_seed_is_told_if_killed_before_the_first_picture(
    dittune, saved, tmp_path, monkeypatch
):
    def killed(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("dittune.pipelines.generate.run", killed)
    code, _, err = dittune("generate", "a ring", "--model", saved, "--out", tmp_path)
    assert code == 130 and err.startswith("continue with --seed ")
