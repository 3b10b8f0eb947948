"""Masks of subjects: from boxes, files and maps; what is wrong with them is said."""

import numpy as np
import pytest
import torch
from PIL import Image

from dittune.errors import ConfigError
from dittune.subjects.boxes import Box, on_grid, parse_boxes, refuse_overlap
from dittune.subjects.masks import mask_file, masks_from_maps, read_masks
from dittune.words.tokens import PromptWords

SUBJECTS = ("red circle", "blue square")
NAMED = [[True, False], [False, True], [True, True]]


def test_boxes_are_read():
    assert parse_boxes(" ") == []
    found = parse_boxes("0,0,0.5,1: a red circle ; 0.5, 0.25, 1, 1:a blue square")
    assert found == [(Box(0, 0, 0.5, 1), "a red circle"), (Box(0.5, 0.25, 1, 1), "a blue square")]
    mask = found[1][0].mask()
    assert mask[60:, 120:].all() and int(mask.sum()) == 180 * 120
    assert int(Box(0.999, 0.999, 1, 1).mask().sum()) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0,0,1: a dog", "x0,y0,x1,y1: LABEL"),
        ("0,0,1,1", "x0,y0,x1,y1: LABEL"),
        ("0,0,1,1:  ", "x0,y0,x1,y1: LABEL"),
        ("a,0,1,1: a dog", "x0,y0,x1,y1: LABEL"),
        ("0.5,0,0.5,1: a dog", "x0 < x1"),
        ("0,0,1.5,1: a dog", "x1 <= 1"),
    ],
)
def test_wrong_boxes_are_refused(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_boxes(text)


def test_masks_on_a_grid_are_apart_and_small_ones_stay():
    masks = torch.zeros(3, 32, 32, dtype=torch.bool)
    masks[0, :17, :17] = True  # more than a quarter of the picture
    masks[1, :17, 17:] = True
    masks[2, 30, 30] = True
    for height, width in ((4, 4), (3, 5), (32, 32), (40, 40)):
        grid = on_grid(masks, height, width)
        assert grid.shape == (3, height, width) and grid.any(2).any(1).all()
        assert int(grid.sum(0).max()) == 1
    assert on_grid(masks, 4, 4)[0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    disc = (torch.arange(8) - 3.5)[:, None] ** 2 + (torch.arange(8) - 3.5) ** 2 < 12
    counts = [int(on_grid(disc[None], 4, 4, cover).sum()) for cover in (0.5, 0.9)]
    assert counts == [12, 4]  # with tokens at the edge, half covered, and without them
    assert not on_grid(torch.zeros(2, 8, 8, dtype=torch.bool), 3, 3).any()
    assert on_grid(masks[:0], 3, 3).shape == (0, 3, 3)


def test_boxes_of_subjects():
    text = "0,0,0.5,0.5: red circle; 0.5,0,1,1: blue square; 0,0.5,0.25,1: red circle @ 2"
    masks = read_masks(text, SUBJECTS, NAMED, (4, 4))
    assert [[int(one.any()) for one in own] for own in masks] == [[1, 0], [0, 1], [1, 1]]
    assert int(masks[0][0].sum()) == 120 * 120 and int(masks[2][0].sum()) == 120 * (120 + 60)


def write(folder, picture, subject, values):
    Image.fromarray(np.uint8(255 * values)).save(folder / mask_file(picture, subject))


def test_a_folder_of_masks(tmp_path):
    left, right = np.zeros((6, 9)), np.zeros((6, 9))
    left[:, :4], right[:, 5:] = 1, 1
    for picture, subject, values in ((0, 0, left), (1, 1, right), (2, 0, left), (2, 1, right)):
        write(tmp_path, picture, subject, values)
    write(tmp_path, 0, 1, left)  # of a subject the prompt does not name: not looked at
    masks = read_masks(str(tmp_path), SUBJECTS, NAMED, (4, 6))
    assert (masks[2].numpy() == np.stack([left, right]).astype(bool)).all()
    assert not masks[0][1].any()


def wrong_folder(folder, fault):
    half = np.zeros((6, 6))
    half[:, :3] = 1
    other = np.ones((6, 6)) if fault == "overlap" else 1 - half
    for picture, subject, values in ((0, 0, half), (1, 1, half), (2, 0, half), (2, 1, other)):
        if fault == "empty" and picture == 0:
            values = 0 * half
        if fault == "shape" and picture == 1:
            values = np.ones((6, 12))
        if fault == "sizes" and (picture, subject) == (2, 1):
            values = np.kron(other, np.ones((2, 2)))
        if fault != "missing" or picture < 2:
            write(folder, picture, subject, values)
    if fault == "no picture":
        (folder / mask_file(0, 0)).write_text("none")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("missing", "no mask of 'red circle' in picture 2.*2-0.png"),
        ("empty", "no mask of 'red circle' in picture 0.*empty"),
        ("overlap", "'red circle' and 'blue square' overlap in 18 pixels"),
        ("shape", "1-1.png is 12 x 6.*4 x 4 tokens"),
        ("sizes", "differ in size"),
        ("no picture", "cannot read the mask"),
    ],
)
def test_wrong_masks_are_refused(tmp_path, fault, says):
    wrong_folder(tmp_path, fault)
    with pytest.raises(ConfigError, match=says):
        read_masks(str(tmp_path), SUBJECTS, NAMED, (4, 4))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0,0,1,1: red circle", "no mask of 'blue square' in picture 1"),
        ("0,0,1,1: red circle; 0,0,1,1: blue square", "picture 2.*overlap"),
        ("0,0,1,1: green ring", "the subjects are red circle, blue square"),
        ("0,0,1,1: red circle @3", "there are 0..2"),
        ("not/a/folder", "masks is a folder or"),
    ],
)
def test_wrong_boxes_of_subjects_are_refused(text, says):
    with pytest.raises(ConfigError, match=says):
        read_masks(text, SUBJECTS, NAMED, (4, 4))


def test_more_overlaps_are_all_found():
    masks = torch.ones(2, 3, 3, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"picture 0: .*'a' and 'b' overlap in 9"):
        refuse_overlap(masks, ["a", "b"], "picture 0")
    refuse_overlap(masks & torch.eye(3, dtype=torch.bool)[:2, None], ["a", "b"], "picture 0")


@pytest.mark.parametrize("kind", ["joint", "cross"])
def test_masks_from_maps(kind):
    """Subject tokens 1 and 2 are looked at in the upper left and lower right of a grid of 6 x 8."""
    maps = torch.full((1, 5, 6, 8), 0.01)
    maps[0, 1, :3, :4], maps[0, 2, 3:, 4:] = 0.5, 0.4
    words = PromptWords((1, 2), (((2,),), ((1,),)), ("blue square", "red circle"))
    (masks,) = masks_from_maps(maps, [words], SUBJECTS, kind)
    assert masks[0, :2, :3].all() and masks[1, 4:, 5:].all()
    assert not masks[0, 4:, 5:].any() and not masks[1, :2, :3].any()
    assert int(masks.sum(0).max()) == 1
    (nobody,) = masks_from_maps(maps, [PromptWords((1, 2), ())], SUBJECTS, kind)
    assert nobody.shape == (2, 6, 8) and not nobody.any()
