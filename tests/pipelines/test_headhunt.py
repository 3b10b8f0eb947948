"""The search for heads: its candidates, its rounds, its files, and what survives a kill."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dittune
from dittune.config import read_yaml, resolve
from dittune.errors import CheckpointError, ConfigError
from dittune.pipelines import cli
from dittune.pipelines.headhunt import heat_map, objectives
from dittune.pipelines.headhunt.candidates import SoftPAGPerImage
from dittune.pipelines.headhunt.search import Search, Trial, hunt
from dittune.pipelines.row_log import RowLog
from dittune.samples.shapes import motion, world
from tests.test_perturbation import explicit, make_call
from tests.tiny import latents, sd3
from tests.tiny_video import wan

ROOT = Path(__file__).parents[2]
HEADS = [f"{layer}:{head}" for layer, head in itertools.product(range(3), range(2))]


# ------------------------------------------------------------------------ candidates


@pytest.mark.parametrize("name", ["identity", "uniform", "blurred_query", "argmax"])
@pytest.mark.parametrize("rows", ["all", "image"])
def test_each_image_has_its_own_map(name, rows):
    sets = ("0:1,0:3", "", "0:0")
    method = SoftPAGPerImage(per_image=sets, perturbation=name, rows=rows, u=0.7)
    call = make_call(method, (1, 3, 4), 5, False)
    three = [torch.randn(6, *t.shape[1:], dtype=t.dtype) for t in (call.query, call.key)]
    call = call._replace(query=three[0], key=three[1], value=torch.randn_like(three[1]))
    out = method.attend(call, lambda c: c.core(c))
    zero = torch.zeros(1, 1, 17, 17, dtype=torch.float64)
    for image, chosen in enumerate([[1, 3], [], [0]]):
        one = call._replace(
            **{k: getattr(call, k)[3 + image :][:1] for k in ("query", "key", "value")}
        )
        assert (out[3 + image] - explicit(method, one, chosen, zero)[0]).abs().max() < 1e-10
    assert torch.equal(out[:3], call.core(call)[:3])


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_candidates_in_one_call_are_what_each_makes_alone(guidance_scale):
    pipe = sd3()
    prompts, seeds = ["a red circle", "a red circle", "a blue ring"], [0, 0, 5]
    sets = ("0:1", "1:0,2:1", "")

    def run(prompt, seed, method):
        generators = [torch.Generator().manual_seed(s) for s in seed]
        with dittune.attach(pipe, method):
            return latents(pipe, prompt, generator=generators, guidance_scale=guidance_scale)

    def latents(pipe, prompt, **kwargs):
        settings = {"height": 32, "width": 32, "max_sequence_length": 8}
        return pipe(
            prompt, num_inference_steps=3, output_type="latent", **settings, **kwargs
        ).images

    method = SoftPAGPerImage(per_image=sets, twin_of=(0, 0, 2), u=0.8, scale=2.0)
    together = run(prompts, seeds, method)
    for image, heads in enumerate(sets):
        alone = run(
            prompts[image], seeds[image : image + 1], dittune.SoftPAG(heads=heads, u=0.8, scale=2.0)
        )
        torch.testing.assert_close(together[image : image + 1], alone, atol=2e-4, rtol=1e-3)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_twins_share_the_plain_prediction_of_the_first_step():
    pipe, rows = sd3(), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    method = SoftPAGPerImage(per_image=("0:0", "0:1", "1:0"), twin_of=(0, 0, 0))
    with dittune.attach(pipe, method):
        latents(pipe, ["a red circle"] * 3, guidance_scale=1.0)
    assert rows == [1, 3, 6]


# ------------------------------------------------------------------------ rounds


class Stub:
    """Stands in for a pipeline: an image is nothing but the head set that made it."""

    def __init__(self):
        self.methods, self.made = [], []

    def __call__(self, prompt, seed, progress, **settings):
        _, method = self.methods
        keys = list(zip(method.per_image, prompt, seed, strict=True))
        self.made += keys
        return type("Result", (), {"images": keys})


WORTH = {"0:0": 1.0, "0:1": 2.0, "1:0": 5.0, "1:1": 4.0, "2:0": 0.5, "2:1": -1.0}


def additive(images, prompts):
    """Heads add up, but 0:0 is worth ten once 1:0 is there."""
    values = []
    for heads, _, seed in images:
        chosen = heads.split(",") if heads else []
        value = sum(WORTH[head] for head in chosen) + 0.01 * seed
        values.append(value + 10 * ({"0:0", "1:0"} <= set(chosen)))
    return values


PAIRS = [(prompt, seed) for prompt in ("a", "b") for seed in range(4)]


def search(**changes):
    settings = {"rounds": 2, "per_round": 2, "halving": False, "batch": 5, "method": {}}
    return Search(**{**settings, "pipeline": {}, **changes})


def test_rounds_are_judged_beside_what_was_found(tmp_path):
    stub = Stub()
    found, plain = hunt(stub, additive, HEADS, PAIRS, search(), tmp_path / "h.csv")
    assert [(f.head, f.round) for f in found] == [("1:0", 1), ("1:1", 1), ("0:0", 2), ("0:1", 2)]
    assert found[2].score == pytest.approx(5 + 4 + 1 + 10 + 0.015) and plain == 0.015
    assert len(stub.made) == 8 + 6 * 8 + 4 * 8 == search().images(6, 8)
    assert len(set(stub.made)) == len(stub.made)


def test_a_second_run_makes_nothing_and_more_rounds_only_what_is_new(tmp_path):
    log = tmp_path / "h.csv"
    first = hunt(Stub(), additive, HEADS, PAIRS, search(), log)
    again = Stub()
    assert hunt(again, additive, HEADS, PAIRS, search(), log) == first and not again.made
    longer, _ = hunt(again, additive, HEADS, PAIRS, search(rounds=3, per_round=2), log)
    assert longer[:4] == first[0] and len(again.made) == 2 * 8


def test_a_torn_last_line_is_made_again(tmp_path):
    log = tmp_path / "h.csv"
    first = hunt(Stub(), additive, HEADS, PAIRS, search(rounds=1), log)
    content = log.read_bytes()
    log.write_bytes(content[:-5])
    again = Stub()
    assert hunt(again, additive, HEADS, PAIRS, search(rounds=1), log) == first
    assert len(again.made) == 1 and log.read_bytes() == content


def test_successive_halving_finds_the_same_for_less(tmp_path):
    stub, halving = Stub(), search(halving=True)
    found, _ = hunt(stub, additive, HEADS, PAIRS, halving, tmp_path / "h.csv")
    assert {f.head for f in found} == {"1:0", "1:1", "0:0", "0:1"}
    assert len(stub.made) == halving.images(6, 8) < 0.7 * search().images(6, 8)
    counts = {}
    for heads, *_ in stub.made:
        counts[heads] = counts.get(heads, 0) + 1
    assert [counts[head] for head in HEADS] == [2, 4, 8, 8, 2, 2]  # of round 1


def test_rungs_never_keep_fewer_than_a_round_adds():
    for pool, pairs, per_round in itertools.product((3, 6, 24), (1, 2, 3, 8), (1, 3)):
        rungs = search(halving=True, per_round=per_round).rungs(pool, pairs)
        kept = [pool, *(k for _, k in rungs)]
        assert rungs[-1] == (pairs, per_round) and kept == sorted(kept, reverse=True)
        assert [count for count, _ in rungs] == sorted({count for count, _ in rungs})


def test_a_log_of_something_else_is_refused(tmp_path):
    (tmp_path / "h.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="has columns a, b, expected base, head"):
        RowLog(tmp_path / "h.csv", Trial).read()


# ------------------------------------------------------------------------ objectives


def scene(*objects, background="white"):
    things = tuple(world.SceneObject(*o) for o in objects)
    return Image.fromarray(world.draw(world.Scene(things, background)))


def test_objectives_on_drawn_scenes():
    small = scene(("red", "circle", 16, 16, 6))
    both = scene(("red", "circle", 16, 16, 8), ("blue", "square", 44, 44, 10), background="black")
    prompts = ["a red circle", "a red circle and a blue ring on a black background"]
    assert objectives.shapes([small, both], prompts) == [1.0, 0.5]
    warm = objectives.warm([small, both], prompts)
    assert warm[0] == 1.0 and 0.2 < warm[1] < 0.5
    large = objectives.large([small, both], prompts)
    assert large[0] == pytest.approx(np.pi * 36 / 4096, rel=0.1) and large[1] > 2 * large[0]
    assert objectives.white([small, both], prompts) == [1.0, 0.0]


def test_the_objective_of_videos_asks_for_motions_too():
    things = [
        motion.MovingObject(world.SceneObject("red", "circle", 16, 16, 8), "right", 2),
        motion.MovingObject(world.SceneObject("blue", "square", 44, 44, 10), "still"),
    ]
    frames = [Image.fromarray(f) for f in motion.draw(motion.Clip(tuple(things), "white"))]
    good = "a red circle moving right and a still blue square"
    half = "a red circle moving left and a blue ring"
    assert objectives.shapes([frames, frames], [good, half]) == [1.0, 0.25]


@pytest.fixture
def clip_folder(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from dittune.samples.shapes import models

    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = models.build_tokenizer()
    text |= {"vocab_size": len(tokenizer), "intermediate_size": 64, "projection_dim": 16}
    text |= {"max_position_embeddings": 32, "eos_token_id": tokenizer.eos_token_id}
    vision = {**text, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path / "clip")
    CLIPProcessor(images, tokenizer).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2"])
def test_preference_models_are_clip_similarities(name, clip_folder):
    judge = objectives.load_objective(name, str(clip_folder))
    pictures = [scene(("red", "circle", 16, 16, 6)), scene(("blue", "ring", 30, 30, 12))]
    prompts = ["a red circle", "a blue ring on a white background"]
    values = judge(pictures, prompts)
    for picture, prompt, value in zip(pictures, prompts, values, strict=True):
        inputs = judge.processor(images=picture, text=prompt, return_tensors="pt", padding=True)
        with torch.no_grad():
            parts = judge.model(**inputs)
        cosine = torch.cosine_similarity(parts.image_embeds, parts.text_embeds)
        assert value == pytest.approx(
            float(cosine * judge.model.logit_scale.detach().exp()), abs=1e-3
        )


def test_objectives_that_cannot_be_had():
    with pytest.raises(ConfigError, match="unknown objective 'beauty'; known: shapes, warm"):
        objectives.load_objective("beauty")
    with pytest.raises(ConfigError, match=r"cannot import objective no\.such:thing"):
        objectives.load_objective("no.such:thing")
    with pytest.raises(ConfigError, match="is no function"):
        objectives.load_objective("math:pi")
    with pytest.raises(ConfigError, match="give a folder with --objective-model"):
        objectives.load_objective("hpsv2")
    with pytest.raises(CheckpointError, match="cannot load objective clip"):
        objectives.load_objective("clip", "/no/such/folder")


def test_the_heat_map_has_a_cell_for_each_head():
    scores = {head: WORTH[head] for head in HEADS}
    picture = heat_map.draw(scores, 1.0, ["1:0", "0:1"], "worth")
    cell = heat_map.CELL

    def color(layer, head):
        return picture.getpixel(
            (heat_map.MARGIN + head * cell + 4, heat_map.BAND + layer * cell + 4)
        )

    assert color(0, 0) == heat_map.SAME  # as good as plain
    assert color(1, 0) == heat_map.BETTER  # the farthest of all
    assert color(2, 1)[0] > color(2, 1)[2]  # worse is red


# ------------------------------------------------------------------------ the command


def arguments(model, out, objective="score", **changes):
    flags = {"--model": model, "--objective": f"tests.pipelines.brightness:{objective}"}
    flags |= {"--prompts": "val", "--limit": 3, "--rounds": 2, "--per-round": 1, "--steps": 2}
    flags |= {"--batch": 4, "--out": out, "--set": "softpag.scale=2", **changes}
    return ["headhunt", *itertools.chain(*([k, str(v)] for k, v in flags.items()))]


def run(args):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    return stop.value.code


def rows(folder):
    found = {}
    for path in sorted(folder.glob("heads*.csv")):
        for row in csv.DictReader(path.read_text().splitlines()):
            key = (row["base"], row["head"], row["prompt"], row["seed"])
            assert key not in found, "made twice"
            found[key] = float(row["score"])
    return found


def test_the_result_is_a_configuration(saved, tmp_path, capsys):
    out = tmp_path / "heads.yaml"
    assert run(arguments(saved, out)) == 0
    heads = read_yaml(out)["methods"]["softpag"]["heads"].split(",")
    assert len(heads) == 2 and set(heads) <= set(HEADS)
    resolved = resolve(read_yaml(out))
    assert resolved.guidance_scale == 1.0 and resolved.methods["softpag"]["scale"] == 2.0
    assert len(rows(tmp_path)) == 3 + 6 * 3 + 5 * 3
    alone = {h: np.mean([v for (b, x, *_), v in rows(tmp_path).items() if (b, x) == ("", h)])
             for h in HEADS}  # fmt: skip
    assert max(alone, key=alone.get) == heads[0]
    with Image.open(tmp_path / "heads.png") as picture:
        assert picture.size[1] > 3 * heat_map.CELL
    assert run([*arguments(saved, out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert [head["head"] for head in document["heads"]] == heads
    assert run(arguments(saved, out, **{"--set": "softpag.scale=3"})) == 2
    assert "was made with other settings (method)" in capsys.readouterr().err
    assert run(arguments(saved, tmp_path / "more.yaml", **{"--rounds": 7})) == 2
    assert "7 rounds of 1 heads need 7 heads" in capsys.readouterr().err
    before = (tmp_path / "heads.png").read_bytes()
    assert run(arguments(saved, out, **{"--prompts": "train", "--limit": 2})) == 0
    assert (tmp_path / "heads.png").read_bytes() != before  # of these prompts only
    assert run(arguments(saved, out)) == 0 and (tmp_path / "heads.png").read_bytes() == before


@pytest.mark.parametrize("name", ["heads.csv", "heads.json", "folder.yaml", "heads"])
def test_out_is_a_file_that_nothing_else_is_written_to(saved, tmp_path, capsys, name):
    (tmp_path / "folder.yaml").mkdir()
    assert run(arguments(saved, tmp_path / name)) == 2
    assert "--out is the file for the heads" in capsys.readouterr().err
    assert not list(tmp_path.glob("heads*"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("methods: {softpag: {first: 2}}", "softpag.first cuts a list of heads"),
        ("size: 96x64", "squares with a side that is a multiple of 64"),
    ],
)
def test_what_no_search_can_use_is_refused(saved, tmp_path, capsys, content, says):
    path = tmp_path / "run.yaml"
    path.write_text(content + "\n")
    words = ["headhunt", "--model", str(saved), "--config", str(path), "--limit", "1"]
    assert run([*words, "--out", str(tmp_path / "heads.yaml")]) == 2
    assert says in capsys.readouterr().err


def test_the_guidance_of_a_file_is_kept(saved, tmp_path):
    path, out = tmp_path / "run.yaml", tmp_path / "heads.yaml"
    path.write_text("guidance_scale: 3.0\n")
    changes = {"--limit": 1, "--rounds": 1, "--steps": 1, "--config": path}
    assert run(arguments(saved, out, **changes)) == 0
    assert read_yaml(out)["guidance_scale"] == 3.0


def test_heads_of_a_video_model(tmp_path, capsys):
    wan().save_pretrained(tmp_path / "tiny-wan")
    (tmp_path / "run.yaml").write_text("size: '64'\nframes: 5\n")
    few = {"--limit": 2, "--rounds": 1, "--config": tmp_path / "run.yaml"}
    words = arguments(tmp_path / "tiny-wan", tmp_path / "heads.yaml", **few)
    words[words.index("--objective") + 1] = "shapes"
    assert run(words) == 0
    assert len(rows(tmp_path)) == 2 + 4 * 2
    assert "moving" in next(iter(rows(tmp_path)))[2]
    words[words.index("--objective") + 1] = "warm"
    assert run([*words, "--out", str(tmp_path / "warm.yaml")]) == 2
    assert "objective warm scores pictures" in capsys.readouterr().err


def launch(command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", *map(str, command)],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_search_goes_on(saved, tmp_path):
    """With a real kill: nothing is lost, nothing made twice, and the result is the same."""
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    out = tmp_path / "killed" / "heads.yaml"
    log = out.with_suffix(".csv")
    with launch(["dittune.pipelines.cli", *arguments(saved, out, "slow")]) as process:
        try:
            deadline = time.monotonic() + 600  # on a machine that does other things too
            while not (log.exists() and log.read_text().count("\n") > 8):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
    before = rows(tmp_path / "killed")
    assert 4 < len(before) < 36 and not out.exists()
    assert run(arguments(saved, out, "slow")) == 0
    after = rows(tmp_path / "killed")
    assert {key: after[key] for key in before} == before and len(after) == 36
    whole = tmp_path / "whole" / "heads.yaml"
    assert run(arguments(saved, whole, "slow")) == 0
    assert read_yaml(whole)["methods"] == read_yaml(out)["methods"]


@pytest.mark.slow
def test_two_processes_share_a_search(saved, tmp_path):
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
    out = tmp_path / "two" / "heads.yaml"
    accelerate = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--module"]
    process = launch([*accelerate, "dittune.pipelines.cli", *arguments(saved, out)])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    shares = [RowLog(path, Trial).read() for path in sorted(out.parent.glob("heads*.csv"))]
    assert len(shares) == 2 and min(map(len, shares)) >= 12
    one = tmp_path / "one" / "heads.yaml"
    assert run(arguments(saved, one)) == 0
    assert read_yaml(one)["methods"] == read_yaml(out)["methods"]
    assert rows(out.parent) == pytest.approx(rows(one.parent), abs=1.0)
