"""Videos are made, recorded, repeated, continued and scored like pictures."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

import dittune
from dittune.errors import ConfigError
from dittune.pipelines import cli
from dittune.pipelines.evaluate import load_prompts
from dittune.pipelines.media import read_record
from dittune.pipelines.scorers import PICTURES, VIDEOS, scorer_for
from dittune.pipelines.video import read_frames, save_video
from dittune.samples.shapes import motion, world
from dittune.samples.shapes.score_video import score_video
from tests.tiny import sd3
from tests.tiny_video import cogvideox, ltx, wan

FAST = ["--steps", "1", "--size", "64", "--frames", "9", "--seed", "7"]
PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    wan().save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys, film):
    """Run a command with the tiny video model: (exit code, standard output, standard error)."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main([*map(str, arguments), "--model", str(film)])
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


def drawn(text=PROMPT, seed=0):
    """The frames of a clip that shows what a caption says."""
    rng = np.random.default_rng(seed)
    while True:
        clip = motion.sample_clip(rng, 1)
        if motion.caption(clip, rng) == text:
            return [Image.fromarray(frame) for frame in motion.draw(clip)]


def test_an_mp4_and_a_gif_hold_the_frames_and_the_record(tmp_path):
    frames = [Image.new("RGB", (64, 48), (20 * i, 100, 200)) for i in range(5)]
    record = {"prompt": "ein Kreis, größer als „alle“ ✓"}
    save_video(frames, tmp_path / "a.mp4", 8, record)
    assert read_record(tmp_path / "a.mp4") == record
    found = read_frames(tmp_path / "a.mp4")
    assert [frame.size for frame in found] == [(64, 48)] * 5
    for frame, wanted in zip(found, frames, strict=True):
        assert np.abs(np.asarray(frame).astype(int) - np.asarray(wanted)).mean() < 4
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 5 and gif.info["duration"] == 120  # GIF counts hundredths
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "a.mp4"]
    with pytest.raises(ConfigError, match="even sides, got 63x48"):
        save_video([frame.crop((0, 0, 63, 48)) for frame in frames], tmp_path / "b.mp4", 8, {})


def test_a_damaged_video(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    for name, match in (("a.mp4", "cannot read video"), ("none.mp4", "cannot read video")):
        with pytest.raises(ConfigError, match=match):
            read_record(tmp_path / name)


def test_a_video_its_repetition_and_what_is_there_already(run, tmp_path):
    settings = ["--method", "softpag", "--set", "softpag.heads=0:1", "--out", tmp_path / "out"]
    code, out, err = run("video", PROMPT, *FAST, *settings)
    path = tmp_path / "out" / "0000-a-red-circle-moving-right-7.mp4"
    assert code == 0 and out.strip() == str(path), err
    record = read_record(path)
    assert record["frames"] == 9 and record["size"] == "64x64"
    assert record["config"]["methods"]["softpag"]["heads"] == "0:1"
    assert record["config"]["model"] == "tiny-wan"
    code, out, err = run("video", PROMPT, *FAST, *settings)
    assert code == 0 and not out and "1 of 1 videos are there already" in err
    again = tmp_path / "again"
    assert run("video", "--from", path, "--out", again)[0] == 0
    for suffix in (".mp4", ".gif"):
        name = path.with_suffix(suffix).name
        assert (again / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    code, _, err = run("video", PROMPT, *FAST, "--frames", "5", *settings)
    assert code == 2 and "made with other settings" in err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["video", PROMPT, "--frames", "8"], "1 more than a multiple of 4, such as 9, got 8"),
        (["video", PROMPT, "--size", "40"], "width must be a multiple of 16"),
        (["video", PROMPT, "--fps", "0"], "fps must be at least 1"),
        (["generate", PROMPT], "tiny-wan makes videos; use `dittune video`"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, arguments, match):
    code, out, err = run(*arguments, "--steps", "1", "--out", tmp_path / "out")
    assert code == 2 and match in err and not out


def test_a_picture_model_makes_no_video(saved, capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["video", PROMPT, "--model", str(saved), "--out", str(tmp_path)])
    assert "tiny-sd3 makes pictures; use `dittune generate`" in capsys.readouterr().err


@pytest.mark.parametrize("build", [cogvideox, ltx])
def test_other_families_make_frames(build):
    pipeline = dittune.Pipeline(build(), [dittune.SoftPAG(heads="0:1")])
    settings = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 1}
    (frames,) = pipeline(PROMPT, seed=1, max_sequence_length=8, **settings).images
    assert [frame.size for frame in frames] == [(64, 64)] * 9
    with pytest.raises(ConfigError, match="frames must be 1 more than a multiple of 4"):
        pipeline(PROMPT, **{**settings, "num_frames": 10})


def test_the_scorer_follows_the_pipeline():
    assert scorer_for(wan()) is VIDEOS and scorer_for(sd3()) is PICTURES
    frames = drawn()
    right = VIDEOS.judge(frames, PROMPT)
    assert right.success and right.num_objects == 1 and right.flicker < 0.5
    wrong = VIDEOS.judge(frames, "a red circle moving left")
    assert not wrong.success and wrong.objects_right and not wrong.stated_right
    assert PICTURES.judge(frames[0], "a red circle").success
    assert VIDEOS.show(frames).size == (3 * world.CANVAS, world.CANVAS)
    prompts = load_prompts("val", 10, scorer=VIDEOS)
    assert all("moving" in prompt or "still" in prompt for prompt in prompts)


def test_eval_scores_videos(run, tmp_path):
    out = tmp_path / "eval"
    settings = ["--limit", "2", "--steps", "1", "--method", "none", "--out", out, "--json"]
    config = tmp_path / "run.yaml"
    config.write_text('size: "64"\nframes: 9\n')
    code, text, err = run("eval", *settings, "--config", config)
    assert code == 0, err
    assert json.loads(text)["rows"][0]["images"] == 2
    with (out / "images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and all("moving" in r["prompt"] or "still" in r["prompt"] for r in rows)
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 3 * 64


def test_the_video_command_by_itself(tmp_path):
    """As a new user types it: the bundled model, its preset, an MP4 that shows what was asked."""
    prompt = "a red circle moving right"
    with pytest.raises(SystemExit) as stop:
        cli.main(["video", prompt, "--seed", "7", "--out", str(tmp_path)])
    assert stop.value.code == 0
    (path,) = tmp_path.glob("*.mp4")
    frames = read_frames(path)
    assert len(frames) == 9 and frames[0].size == (64, 64)
    assert score_video([np.asarray(frame) for frame in frames], prompt).success


@pytest.mark.parametrize(("named", "model"), [("", "shapes-wan"), ("model: mine", "mine")])
def test_a_file_without_a_model_films_with_the_bundled_one(tmp_path, capsys, named, model):
    path = tmp_path / "run.yaml"
    path.write_text(f"steps: 4\n{named}\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["video", PROMPT, "--config", str(path), "--dry-run"])
    assert stop.value.code == 0 and f"model: {model}\n" in capsys.readouterr().out
