"""Evaluation: scores, pairs, intervals, resumption; and the overhead benchmark's gate."""

import json
import math
import time
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import dittune
from dittune.errors import ConfigError, DittuneError
from dittune.pipelines import bench, cli, eval_table, evaluate
from dittune.pipelines.evaluate import ImageScore, Variant
from dittune.pipelines.row_log import RowLog
from dittune.samples.shapes import world
from dittune.samples.shapes.prompts import prompt_set


class Painter:
    """Stands in for a pipeline: draws what the prompt says, wrong if its methods say so."""

    def __init__(self):
        self.methods, self.calls = [], 0

    def __call__(self, prompts, seed, progress, **settings):
        self.calls += 1
        images = []
        for prompt, number in zip(prompts, seed, strict=True):
            request = world.parse(prompt)
            things = [
                world.SceneObject(n.color, n.shape, 16 + 32 * (i % 2), 16 + 32 * (i // 2), 10)
                for i, n in enumerate(request.objects)
            ]
            if self.methods and number % 2:
                things = things[1:]
            scene = world.Scene(tuple(things), request.background or "white")
            images.append(Image.fromarray(world.draw(scene)))
        return SimpleNamespace(images=images, record={"report": {}})


PROMPTS = ["a red circle", "a blue square and a pink ring", "a green cross on a black background"]


def run(painter, out, variants=None):
    variants = variants or [Variant("none"), Variant("worse", (dittune.SoftPAG(heads="0:0"),))]
    return evaluate.evaluate(painter, variants, PROMPTS, 2, out, batch=2)


def test_scores_pairs_and_resumption(tmp_path):
    painter = Painter()
    scores = run(painter, tmp_path)
    assert len(scores) == 12 and all(s.success for s in scores if s.variant == "none")
    assert [s.seed for s in scores if not s.success] == [1, 3, 5]
    rows = eval_table.summarize(scores)
    assert [row["success"]["share"] for row in rows] == [1.0, 0.5]
    assert rows[0]["difference"] is None and rows[1]["difference"][0] == -0.5
    assert (tmp_path / "grid.png").exists()
    calls = painter.calls
    lines = (tmp_path / "images.csv").read_text().splitlines()
    (tmp_path / "images.csv").write_text("\n".join(lines[:-2]) + "\n")
    assert run(painter, tmp_path) == scores or len(run(painter, tmp_path)) == 12
    assert painter.calls <= calls + 1 + 2 * 2 + 2  # two missing images, and the grids


def test_no_two_images_begin_with_the_same_noise():
    pairs = evaluate.with_seeds(PROMPTS, 2)
    assert [prompt for prompt, _ in pairs] == PROMPTS * 2
    assert [seed for _, seed in pairs] == list(range(6))


def test_wilson_interval():
    assert eval_table.wilson(0, 0) == (0.0, 1.0)
    low, high = eval_table.wilson(97, 100)
    assert (low, high) == pytest.approx((0.9155, 0.9897), abs=1e-4)
    assert eval_table.wilson(100, 100)[1] == pytest.approx(1.0)


def test_paired_difference_is_over_prompts():
    base = [
        ImageScore("a", str(p), s, 1, False, False, True, 0, math.nan, 0.1, 1.0)
        for p in range(50)
        for s in (0, 1)
    ]
    better = [replace(s, variant="b", success=int(s.prompt) % 2 == 0) for s in base]
    mean, low, high = eval_table.paired_difference(better, base)
    half = 1.96 * np.std([0, 1] * 25, ddof=1) / 50**0.5
    assert mean == 0.5 and low == pytest.approx(0.5 - half, abs=1e-3)
    assert high - mean == pytest.approx(mean - low)
    assert eval_table.paired_difference(better[:2], base[:2]) is None


def test_share_of_failures_removed():
    """Against a jackknife over prompts, which is another way to the interval."""
    rng = np.random.default_rng(0)
    was, now = rng.random(400) < 0.6, rng.random(400) < 0.7
    base, variant = (
        [ImageScore(v, str(p), 0, 1, bool(x), True, True, 0, math.nan, 0.1, 1.0)
         for p, x in enumerate(hits)]
        for v, hits in (("a", was), ("b", now))
    )  # fmt: skip
    ratio, low, high = eval_table.failures_removed(variant, base)
    assert ratio == pytest.approx((now.sum() - was.sum()) / (~was).sum())
    total, failed = now.sum() - was.sum(), (~was).sum()
    left_out = (total - (1.0 * now - was)) / (failed - ~was)
    half = 1.96 * (399 * left_out.var()) ** 0.5
    assert high - ratio == pytest.approx(half, rel=0.02) == ratio - low
    assert eval_table.failures_removed(variant, [replace(s, success=True) for s in base]) is None


def test_difference_to_the_mean_of_a_sweep():
    def scores(variant, hits):
        return [
            ImageScore(variant, str(p), 0, 1, p < hits, True, True, 0, math.nan, 0.1, 1.0)
            for p in range(40)
        ]

    every = scores("found", 30) + scores("a", 10) + scores("b", 20)
    (gap,) = eval_table.against_sweep(every, ["found"], ["a", "b"]).values()
    by_prompt = [0.0] * 10 + [0.5] * 10 + [1.0] * 10 + [0.0] * 10
    assert gap[0] == pytest.approx(np.mean(by_prompt))
    assert gap[2] - gap[0] == pytest.approx(1.96 * np.std(by_prompt, ddof=1) / 40**0.5, rel=1e-3)


def test_prompts(tmp_path):
    assert evaluate.load_prompts("test") == list(prompt_set("test"))
    some = evaluate.load_prompts("test", 24)
    assert len(some) == 24 and len({len(world.parse(p).objects) for p in some}) == 4
    assert {len(world.parse(p).objects) for p in evaluate.load_prompts("test", 9, [2, 3])} == {2, 3}
    path = tmp_path / "mine.txt"
    path.write_text("a red circle\n\n")
    with pytest.raises(ConfigError, match="no prompt with 2 or 3 objects"):
        evaluate.load_prompts(str(path), objects=[2, 3])
    assert evaluate.load_prompts(str(path)) == ["a red circle"]
    path.write_text("a photo of a cat\n")
    with pytest.raises(ConfigError, match="cannot judge"):
        evaluate.load_prompts(str(path))
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        evaluate.load_prompts(str(path))
    with pytest.raises(ConfigError, match="train, val, test"):
        evaluate.load_prompts("nowhere")


def test_the_command(saved, tmp_path, capsys):
    arguments = [
        "eval",
        "--model",
        saved,
        "--limit",
        "2",
        "--steps",
        "1",
        "--out",
        tmp_path,
        "--json",
    ]
    arguments += ["--method", "none", "--method", "pag=softpag", "--set", "pag.heads=0:*"]
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    assert stop.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in document["rows"]] == ["none", "pag"]
    assert document["config"]["methods"]["pag"]["heads"] == "0:*"
    assert "| pag |" in (tmp_path / "table.md").read_text()


def test_the_model_of_a_configuration_file(saved, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {saved}\nsteps: 1\n")
    words = ["eval", "--config", str(config), "--limit", "2", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--json"])
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)["config"]["model"] == str(saved)


def test_the_methods_of_a_configuration_file_are_the_variants(saved, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {saved}\nsteps: 1\nmethods: {{softpag: {{heads: '0:*'}}}}\n")
    words = ["eval", "--config", str(config), "--limit", "2", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        cli.main([*words, "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["variant"] for row in rows] == ["none", "softpag"]


@pytest.mark.parametrize(
    ("content", "more", "says"),
    [
        ("size: 96x64", [], "squares with a side that is a multiple of 64, got 96x64"),
        ("frames: 1", [], "videos of 2 frames and more"),
        ("methods: {softpag: {heads: '0:1'}}", ["--sweep", "softpag.u=0.5;0.5"], "given twice"),
    ],
)
def test_what_cannot_be_scored_is_refused(saved, tmp_path, capsys, content, more, says):
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {saved}\nsteps: 1\n{content}\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", "--config", str(config), "--out", str(tmp_path / "out"), *more])
    assert stop.value.code == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_guidance_of_a_variant_leaves_the_negative_prompt(monkeypatch):
    monkeypatch.setattr(
        evaluate, "guidance", lambda _, scale: {"true_cfg_scale": scale, "negative_prompt": ""}
    )
    seen = []

    class Recorder:
        pipe = None

        def __call__(self, prompts, **settings):
            seen.append(settings)

    for given, wanted in (({"negative_prompt": "a ring"}, "a ring"), ({}, "")):
        evaluate._make(Recorder(), Variant("none@2", (), 2.0), ["x"], [0], given)
        assert seen[-1]["negative_prompt"] == wanted and seen[-1]["true_cfg_scale"] == 2.0


def test_a_folder_belongs_to_its_settings(saved, tmp_path, capsys):
    words = ["eval", "--model", str(saved), "--limit", "2", "--out", str(tmp_path)]
    words += ["--method", "none", "--method", "softpag", "--set", "softpag.heads=0:*"]

    def code(*more):
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, *more])
        return stop.value.code, capsys.readouterr().err

    assert code("--steps", "1")[0] == 0
    found, said = code("--steps", "2")
    assert found == 2 and "made with other settings (pipeline); choose another --out" in said
    found, said = code("--steps", "1", "--set", "softpag.u=0.5")
    assert found == 2 and "(variant softpag)" in said
    found, said = code("--steps", "1", "--dtype", "bfloat16")
    assert found == 2 and "(dtype)" in said
    assert code("--steps", "1", "--method", "more=softpag", "--set", "more.heads=0:1")[0] == 0
    variants = [row.variant for row in RowLog(tmp_path / "images.csv", ImageScore).read()]
    assert variants == ["none"] * 2 + ["softpag"] * 2 + ["more"] * 2


def test_what_the_model_refuses_is_refused_before_the_first_picture(saved, tmp_path, capsys):
    words = ["eval", "--model", str(saved), "--prompts", "val", "--limit", "2", "--steps", "1"]
    words += ["--method", "none", "--method", "natten", "--set", "natten.dense_layers=9"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "dense_layers names layer 9" in capsys.readouterr().err
    assert not (tmp_path / "out" / "images.csv").exists()


def test_sweeps_guidance_and_a_further_score(saved, tmp_path, capsys):
    arguments = ["eval", "--model", saved, "--limit", 3, "--steps", 1, "--guidance-scale", 1]
    arguments += ["--method", "none", "--method", "none@4", "--method", "pag=softpag"]
    arguments += ["--set", "pag.heads=0:*,1:0,2:1", "--sweep", "pag.first=1;3"]
    arguments += ["--sweep", "pag.u=0;0.5", "--objective", "tests.pipelines.brightness:score"]
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in [*arguments, "--out", tmp_path, "--json"]])
    assert stop.value.code == 0
    rows = {row["variant"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    labels = ["none", "none@4", "pag", "pag.first=1", "pag.first=3", "pag.u=0", "pag.u=0.5"]
    assert list(rows) == labels
    values = {label: row["objective"] for label, row in rows.items()}
    assert values["pag.first=3"] == values["pag"] and values["pag.u=0"] == values["none"]
    assert len({values[label] for label in ("none", "none@4", "pag", "pag.first=1")}) == 4
    assert rows["none@4"]["objective_difference"][0] == pytest.approx(
        values["none@4"] - values["none"], abs=2e-4
    )
    assert "none@4 - mean of pag.first: " in (tmp_path / "table.md").read_text()
    picture = ElementTree.parse(tmp_path / "curves.svg").getroot()
    assert len(picture.findall("{*}circle")) == 4 and len(picture.findall("{*}polyline")) == 2
    fast = [*arguments[:-6], "--merge-padding", "--objective", arguments[-1]]
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in [*fast, "--out", tmp_path / "fast", "--json"]])
    for row in json.loads(capsys.readouterr().out)["rows"]:
        assert row["objective"] == pytest.approx(values[row["variant"]], abs=0.5)
    sparse = ["eval", "--model", saved, "--limit", 2, "--steps", 2, "--method", "none"]
    sparse += ["--method", "natten", "--set", "natten.window=1"]
    sparse += ["--sweep", "natten.window=1;99", "--sweep", "natten.start=0;0.5"]
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in [*sparse, "--out", tmp_path / "sparse", "--json"]])
    rows = json.loads(capsys.readouterr().out)["rows"]
    share = {row["variant"]: row.get("computed") for row in rows}
    assert share["none"] is None and share["natten.window=99"] == 1
    assert share["natten.window=1"] == share["natten"] < share["natten.start=0.5"] < 1
    picture = ElementTree.parse(tmp_path / "sparse" / "work.svg").getroot()
    assert len(picture.findall("{*}circle")) == 4 and len(picture.findall("{*}polyline")) == 2
    for flag, value, message in (
        ("--sweep", "pag.first", "is written METHOD.FIELD=V1;V2"),
        ("--sweep", "other.u=1", "method 'other' is not in use"),
        ("--method", "none@many", "after @ comes a guidance scale"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in [*arguments, flag, value, "--out", tmp_path]])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_processes_share_the_work(tmp_path, monkeypatch):
    """Two of them, one after the other: together they make every image once."""

    class Second(evaluate.Team):
        def __init__(self):
            self.rank, self.size, self.local_rank = 1, 2, 1

    class First(Second):
        def __init__(self):
            self.rank, self.size, self.local_rank = 0, 2, 0

        def logs(self, log):
            return []  # both begin at the same time

    for team, count in ((Second, 4), (First, 8)):
        monkeypatch.setattr(evaluate, "Team", team)
        run(Painter(), tmp_path)
        assert len(RowLog(team().own(tmp_path / "images.csv"), ImageScore).read()) == count
    paths = Second().logs(tmp_path / "images.csv")
    made = [(s.variant, s.prompt, s.seed) for p in paths for s in RowLog(p, ImageScore).read()]
    assert len(paths) == 2 and len(made) == len(set(made)) == 12


def test_peak_memory_sees_an_allocation():
    with evaluate.PeakMemory() as before:
        np.ones(1)
        time.sleep(0.1)
    with evaluate.PeakMemory() as after:
        block = np.ones(50_000_000)
        time.sleep(0.1)
    assert after.mib > before.mib + 200 and block[0] == 1


def test_bench_times_nothing_that_changed(saved, monkeypatch):
    pipe = dittune.Pipeline.from_pretrained(str(saved)).pipe
    embeds = {
        "prompt_embeds": torch.randn(1, 40, 128),
        "pooled_prompt_embeds": torch.randn(1, 128),
    }
    sample = bench._sampler(pipe, 1, embeds, guidance_scale=1.0)
    row = bench.attach_overhead(pipe, sample, rounds=3, steps=1)
    assert row["ratio"] == row["attached_ms"] / row["plain_ms"]
    assert row["ratio_p20"] <= row["ratio_median"] <= row["ratio_p80"]
    monkeypatch.setattr(bench.DoNothing, "attend", lambda self, call, proceed: call.value)
    with pytest.raises(DittuneError, match="changed the output"):
        bench.attach_overhead(pipe, sample, rounds=3, steps=1)
