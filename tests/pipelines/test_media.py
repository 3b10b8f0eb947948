"""Pictures on disk: whole or absent, and what can be wrong with a record."""

import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dittune.errors import ConfigError
from dittune.pipelines.media import read_record, save_png, table

RECORD = {
    "prompt": "a = b, \"c\" ${d} 'e': f \N{SNOWMAN}",
    "seed": 7,
    "size": "8x8",
    "config": {"steps": 2, "negative_prompt": "a blue square", "methods": {"softpag": {}}},
}


def picture():
    return Image.new("RGB", (8, 8), "red")


def test_a_record_comes_back_and_other_viewers_can_read_it(tmp_path):
    path = tmp_path / "a.png"
    save_png(picture(), path, RECORD)
    assert read_record(path) == RECORD
    with Image.open(path) as image:
        lines = image.info["parameters"].split("\n")
    assert lines == [
        RECORD["prompt"],
        "Negative prompt: a blue square",
        "Steps: 2, Seed: 7, Size: 8x8, Methods: softpag",
    ]


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(picture(), path, RECORD)
    before = path.read_bytes()

    def fail(self, place, **_):
        place.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(picture(), path, RECORD)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["{", "5", "[]"])
def test_a_damaged_record(tmp_path, text):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("dittune", text)
    picture().save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ConfigError, match="is damaged"):
        read_record(tmp_path / "a.png")


def test_a_damaged_picture(tmp_path):
    path = tmp_path / "a.png"
    save_png(picture(), path, RECORD)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:20], b"", json.dumps(RECORD).encode()):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="cannot read picture"):
            read_record(path)


def test_a_table_names_rows_and_columns():
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue", "white")] * 2
    sheet = table(pictures, ["none", "a.very_long_setting=of,a,method"], ["a", "b", "c", "d"])
    assert np.asarray(sheet)[..., 0].min() == 0  # there is text
    left, top = sheet.width - 4 * 20, sheet.height - 2 * 20
    for i in range(8):
        row, column = divmod(i, 4)
        place = left + column * 20 + 8, top + row * 20 + 8
        assert sheet.getpixel(place) == pictures[i].getpixel((0, 0))
