"""Watching heads changes nothing, and measures what it says."""

import math

import pytest
import torch

import dittune
from dittune.pipelines.head_pictures import WatchHeads
from dittune.pipelines.headhunt import heat_map
from tests.tiny import FAMILIES, latents


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_watching_changes_nothing(family, guidance_scale):
    pipe, watch = FAMILIES[family](), WatchHeads()
    longer = {"max_sequence_length": 16} if family == "flux" else {}
    settings = {"guidance_scale": guidance_scale, "height": 16, "width": 48, **longer}
    plain = latents(pipe, "a red circle", **settings)
    with dittune.attach(pipe, watch) as handle:
        assert torch.equal(latents(pipe, "a red circle", **settings), plain)
        assert handle.report()["head_pictures"] == {}
    assert watch.seen and all(0 < spread <= 1 for spread in watch.seen.values())
    head = next(iter(watch.seen))
    with dittune.attach(pipe, dittune.SoftPAG(heads=head)):  # the names are those of softpag
        assert not torch.equal(latents(pipe, "a red circle", **settings), plain)


def test_uniform_attention_is_one_and_sharp_attention_less():
    from types import SimpleNamespace

    from dittune.pipelines.head_pictures import _spread

    def call(scale):
        torch.manual_seed(0)
        query, key = (torch.randn(2, 3, 10, 8, dtype=torch.float64) for _ in range(2))
        query = scale * query
        made = SimpleNamespace(
            query=query, key=key, options={}, layout=SimpleNamespace(image=(2, 9))
        )
        made.take_queries = lambda first, last: SimpleNamespace(
            query=query[:, :, first:last], key=key, options={}
        )
        return made

    assert _spread(call(0.0)).tolist() == pytest.approx([1.0] * 3)
    one = call(1.0)
    chances = (one.query[:, :, 2:9] @ one.key.transpose(2, 3) / math.sqrt(8)).softmax(-1)
    entropy = -(chances * chances.log()).sum(-1).mean((0, 2)) / math.log(10)
    assert _spread(one).tolist() == pytest.approx(entropy.tolist())
    assert (_spread(call(9.0)) < entropy).all()


def test_a_cell_of_the_grid_is_found_again():
    scores = {f"{layer}:{head}": layer + head / 10 for layer in range(3) for head in range(5)}
    picture = heat_map.draw(scores, 1.0, ["2:4"], "title", "mean")
    for name in scores:
        layer, head = map(int, name.split(":"))
        x, y = heat_map.MARGIN + head * heat_map.CELL + 3, heat_map.BAND + layer * heat_map.CELL + 3
        assert heat_map.head_at(scores, x, y) == name
        assert picture.getpixel((x, y)) != (255, 255, 255)
    for x, y in ((5, 60), (70, 10), (70, picture.height - 3), (picture.width - 2, 60)):
        assert heat_map.head_at(scores, x, y) is None
