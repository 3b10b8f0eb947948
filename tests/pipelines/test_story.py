"""Stories: what is made, continued and refused, and what their evaluation reads."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dittune.errors import ConfigError
from dittune.methods.isolation import Isolation
from dittune.methods.merge_padding import MergePadding
from dittune.methods.shared_attention import SharedAttention
from dittune.pipelines import story_eval, story_table
from dittune.pipelines.cli import main
from dittune.pipelines.media import read_record
from dittune.pipelines.segment import load_segmenter, shapes, write_masks
from dittune.pipelines.story import named_in, phrase_of, with_subjects
from dittune.samples.shapes import marks, world
from dittune.subjects.method import SubjectMethod

VARIANTS = story_eval.variants(SharedAttention(keep=1.0), Isolation(keep=1.0))
SCENES = ["a blue square and the red circle", "a ring", "a red circle"]


def halves(picture, phrase):
    """A segmenter of a user's own: red is left, blue is right, and the ring is nowhere."""
    mask = np.zeros((picture.height, picture.width), bool)
    middle = picture.width // 2
    if "red" in phrase:
        mask[:, :middle] = True
    if "blue" in phrase:
        mask[:, middle:] = True
    return mask


def command(saved, out, *more):
    (out.parent / "scenes.txt").write_text("\n".join(SCENES))
    main(["story", "--subject", "a red circle", "--subject", "a blue square", "--scenes",
          str(out.parent / "scenes.txt"), "--model", str(saved), "--steps", "2", "--size", "32",
          "--out", str(out), *more])  # fmt: skip


@pytest.mark.parametrize("masks", ["maps", "tests.pipelines.test_story:halves"])
def test_a_story_is_made_and_continued(saved, tmp_path, capsys, masks):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as done:
        command(saved, out, "--masks", masks, "--json")
    assert done.value.code == 0
    made = json.loads(capsys.readouterr().out)
    assert [row["subjects"] for row in made["scenes"]] == [
        "a red circle, a blue square", "", "a red circle",
    ]  # fmt: skip
    assert [row["seed"] for row in made["scenes"]] == [2, 3, 4]
    pictures = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert set(pictures) == {"story.png", *(f"reference-00{i}.png" for i in (0, 1)),
                             *(f"scene-00{k}.png" for k in range(3))}  # fmt: skip
    report = read_record(out / "scene-000.png")["report"]["isolation"]
    assert report["pictures"] == 3 and report["masked"][2] > 0
    assert "isolation" not in read_record(out / "scene-001.png")["report"]  # nobody is in it
    assert (out / "masks" / "000" / "2-1.png").exists() == (masks != "maps")
    (out / "scene-002.png").unlink()  # killed before it was written
    with pytest.raises(SystemExit):
        command(saved, out, "--masks", masks, "--json")
    assert [row["scene"] for row in json.loads(capsys.readouterr().out)["scenes"]] == [2]
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == pictures
    with pytest.raises(SystemExit) as refused:
        command(saved, out, "--masks", masks, "--set", "isolation.keep=0.9")
    assert refused.value.code == 2
    assert "made with other settings" in capsys.readouterr().err
    for name in ("story.png", "reference-000.png"):
        (out / name).unlink()
    with pytest.raises(SystemExit):
        command(saved, out, "--masks", masks)
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == pictures
    for path in [*out.glob("scene-*"), out / "story.csv", out / "story.png"]:
        path.unlink()  # killed after the references
    with pytest.raises(SystemExit) as refused:
        command(saved, out, "--masks", masks, "--seed", "5")
    assert refused.value.code == 2 and "reference-000.png was made" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        main(["generate", "--from", str(out / "reference-000.png"), "--out", str(tmp_path)])
    assert refused.value.code == 2 and "`dittune story` makes it" in capsys.readouterr().err


def test_scenes_of_several_lines_are_continued(saved, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("prompts:\n- |\n  a red circle\n  alone\n- a ring\nsteps: 1\nsize: '32'\n")
    for _ in range(2):
        with pytest.raises(SystemExit) as done:
            main(["story", "--subject", "a red circle", "--config", str(path), "--model",
                  str(saved), "--out", str(tmp_path / "out")])  # fmt: skip
        assert done.value.code == 0
    assert "2 of 2 scenes are there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--subject", "the red circle"], "given twice"),
        (["--subject", "a cat, a dog"], "one phrase"),
        (["--masks", "nothing"], "'shapes' or MODULE:FUNCTION"),
        (["--masks", "tests.pipelines.test_story:missing"], "cannot import segmenter"),
    ],
)
def test_wrong_stories_are_refused(saved, tmp_path, capsys, more, says):
    with pytest.raises(SystemExit) as done:
        command(saved, tmp_path / "out", *more)
    assert done.value.code == 2 and says in capsys.readouterr().err


def test_who_is_named():
    subjects = ["a red circle", "the old dog"]
    assert [phrase_of(s) for s in subjects] == ["red circle", "old dog"]
    assert named_in("The Red  circle", subjects) == ["a red circle"]
    assert named_in("a red circles and an old dog", subjects) == ["the old dog"]


def test_methods_are_told_of_the_subjects():
    plain, method = MergePadding(), Isolation(keep=0.7)
    told = with_subjects([plain, method], ["a red circle", "a dog"], "folder")
    assert told[0] is plain and (told[1].subjects, told[1].references) == ("red circle, dog", 2)
    assert (told[1].masks, told[1].keep) == ("folder", 0.7)
    assert with_subjects([plain, method], []) == [plain]


def test_segmented_masks_are_apart_and_only_of_what_is_there(tmp_path):
    def everything(picture, phrase):
        return halves(picture, phrase) if phrase != "all" else np.ones((8, 8), bool)

    pictures = [Image.new("RGB", (8, 8))] * 4
    subjects = ["red", "green", "all"]
    assert write_masks(tmp_path, pictures, subjects, everything) == ["red", "all"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "0-0.png",
        "1-1.png",
        "2-0.png",
        "2-1.png",
    }
    first, second = (np.asarray(Image.open(tmp_path / f"2-{i}.png")) > 0 for i in (0, 1))
    assert (first ^ second).all()


@pytest.mark.parametrize("wrong", [np.ones((8, 8)), np.ones((4, 4), bool)])
def test_a_wrong_segmenter_is_told(tmp_path, wrong):
    with pytest.raises(ConfigError, match=r"expected bool \(8, 8\)"):
        write_masks(tmp_path, [Image.new("RGB", (8, 8))] * 2, ["a"], lambda *_: wrong)


def test_the_segmenter_of_the_shapes_world():
    things = (world.SceneObject("red", "circle", 20, 20, 10),
              world.SceneObject("blue", "square", 45, 45, 8))  # fmt: skip
    picture = Image.fromarray(marks.draw(world.Scene(things, "gray"), ["deep", "plain"], 128))
    segment = load_segmenter("shapes")
    mask = segment(picture, "blue square")
    assert mask.shape == (128, 128) and mask[90, 90] and int(mask.sum()) == 32 * 32
    assert segment(picture, "red circle")[40, 44] and not segment(picture, "red ring").any()
    with pytest.raises(ConfigError, match="no 'a dog'"):
        shapes(picture, "a dog")


class Painter:
    """Stands for a pipeline: draws what is asked; only reposition keeps marks, isolation fuses."""

    PLACES = ((16, 16), (48, 48), (48, 16), (16, 48))

    def __call__(self, prompts, seed, progress, **settings):
        acting = [m for m in self.methods if isinstance(m, SubjectMethod)]
        assert all(method.masks for method in acting)
        assert len({world.parse(prompt).background for prompt in prompts}) == 1
        images = []
        for prompt in prompts:
            things, own = [], []
            named = world.parse(prompt).objects
            for thing, place in zip(named, self.PLACES, strict=False):
                scene = len(named) > 1
                method = acting[0] if acting and scene else None
                fused = method is not None and not getattr(method, "reposition", True)
                shape = "ring" if fused and thing.shape != "ring" else thing.shape
                things.append(world.SceneObject(thing.color, shape, *place, 10))
                keeps = method is not None and getattr(method, "reposition", False)
                own.append("deep" if keeps or not scene else "dark")
            scene = world.Scene(tuple(things), "white")
            images.append(Image.fromarray(marks.draw(scene, own)))
        return SimpleNamespace(images=images)


def test_kept_marks_are_counted(tmp_path):
    told = [*story_eval.stories("val", 2, (2, 3))]
    assert [len(subjects) for subjects in told] == [2, 2, 3, 3]
    assert told == [*story_eval.stories("val", 2, (2, 3))]
    rows = story_eval.evaluate_stories(Painter(), VARIANTS, told, tmp_path)
    assert len(rows) == 5 * 10
    assert len({world.parse(row.prompt).background for row in rows} - {None}) == 3
    table = {line["variant"]: line for line in story_table.summarize(rows)}
    kept = {label: line["kept"]["share"] for label, line in table.items()}
    assert kept == {"none": 0, "shared_attention": 0, "isolation": 0, "reposition": 1, "both": 1}
    assert table["both"]["difference"][0] == 1.0 and table["both"]["found"]["share"] == 1.0
    assert table["isolation"]["fused_a_scene"] > 0 == table["both"]["fused_a_scene"]
    assert [line["over_second"] for line in table.values()][:2] == [None, None]
    assert table["both"]["over_second"] == (1.0, 1.0, 1.0)
    assert table["both"]["fused_difference"] == (0.0, 0.0, 0.0)
    fused = table["isolation"]["fused_a_scene"]
    assert table["isolation"]["fused_difference"][0] == fused
    lost = [replace(row, readable=False, kept=False) for row in rows[-1:]]
    (line,) = story_table.summarize([row for row in rows if row.variant == "both"][:-1] + lost)
    assert line["kept"]["share"] == line["readable"]["share"] == 0.9
    text = story_table.as_markdown([*table.values()])
    assert "| both | 10 | 100.0 (72.2 to 100.0) |" in text and "| over shared_attention |" in text
    alone = story_table.as_markdown(story_table.summarize(rows[:2]))
    assert len(set(map(len, (line.split("|") for line in alone.splitlines())))) == 1
    assert (tmp_path / "stories.png").exists()
    assert story_eval.evaluate_stories(None, VARIANTS, told, tmp_path) == rows
    picture = story_table.against_distance(rows, ["isolation", "both"], "title")
    assert picture.count("<polyline") == 2


def test_costs_are_told():
    found = story_table.costs(Painter(), {"none": (), "both": (Isolation(),)}, (1, 2), rounds=1)
    assert [(c["variant"], c["references"]) for c in found] == [
        ("scene alone", 0), ("none", 1), ("both", 1), ("none", 2), ("both", 2),
    ]  # fmt: skip
    assert story_table.costs_markdown(found).count("\n") == 7
