"""Heat maps of concepts: they change nothing, and show what was seen."""

import numpy as np
import pytest
import torch
from PIL import Image

import dittune
from dittune.config import RunConfig
from dittune.pipelines import generate
from dittune.pipelines.map_pictures import HOT, WatchWords, overlay, sheet
from dittune.pipelines.media import read_record
from tests.tiny import FAMILIES, latents, sd3


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_watching_changes_nothing(family, guidance_scale):
    pipe, watch = FAMILIES[family](), WatchWords()
    longer = {"max_sequence_length": 16} if family == "flux" else {}
    settings = {"guidance_scale": guidance_scale, "height": 16, "width": 48, **longer}
    prompts = ["a red circle and a blue square", "of and the"]
    plain = latents(pipe, prompts, **settings)
    with dittune.attach(pipe, watch, dittune.AStar(start=0.9)) as handle:
        assert torch.equal(latents(pipe, prompts, **settings), plain)
        assert handle.report()["map_pictures"] == {}
    assert [list(maps) for maps in watch.seen] == [["red circle", "blue square"], []]
    for values in watch.seen[0].values():
        height, width = values.shape
        assert width == 3 * height and (values > 0).all() and (values < 1).all()
    assert not torch.equal(*watch.seen[0].values())


def test_it_sees_the_maps_after_a_gradient_step():
    pipe, watch, means = sd3(), WatchWords(concepts="circle"), []
    for method in ([], [dittune.AttendAndExcite(concepts="circle", stop=1.0)]):
        with dittune.attach(pipe, watch, *method) as handle:
            latents(pipe, "a red circle and a blue square", steps=4)
            handle.report()
            means.append(watch.seen[0]["circle"].max())
    assert means[1] > means[0]


def test_the_overlay_covers_the_highest_value():
    image = Image.new("RGB", (40, 20), (0, 0, 200))
    values = torch.zeros(2, 4)
    values[1, 3] = 0.3
    over = np.asarray(overlay(image, values)).astype(float)
    assert over[0, 0].tolist() == [0, 0, 200]
    assert over[-1, -1] == pytest.approx(0.75 * HOT + 0.25 * np.array([0, 0, 200]), abs=1)
    assert np.asarray(overlay(image, values * 0)).reshape(-1, 3).max(0).tolist() == [0, 0, 200]


def test_a_sheet_has_the_picture_and_one_panel_a_concept():
    image = Image.new("RGB", (40, 20), "white")
    one, three = (sheet(image, dict.fromkeys("abc"[:n], torch.rand(2, 4))) for n in (0, 2))
    assert three.width == 3 * one.width and three.height == one.height


def test_the_picture_is_the_same_file_with_maps_and_without(saved, tmp_path):
    files = {}
    for show in (False, True):
        config = RunConfig(
            model=str(saved), prompts=["a red circle"], steps=1, seed=3, guidance_scale=1.0
        )
        out = tmp_path / str(show)
        todo = generate.prepare(config, out)
        list(generate.run(config, todo, generate.load(config), show))
        files[show] = sorted(out.iterdir())
    assert files[False][0].read_bytes() == files[True][1].read_bytes()
    assert files[True][0].name == f"{files[False][0].stem}-maps.png"
    assert read_record(files[True][0]) == read_record(files[True][1])
