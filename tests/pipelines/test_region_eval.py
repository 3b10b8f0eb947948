"""Objects in boxes are counted as they are."""

from types import SimpleNamespace

from PIL import Image

from dittune.methods.regions import Regions
from dittune.pipelines.region_eval import (
    LAYOUTS,
    as_markdown,
    evaluate_regions,
    region_prompts,
    regions_of,
)
from dittune.samples.shapes import world

CENTRES = {"0,0,0.5,1": (14, 20), "0.5,0,1,1": (50, 20), "0,0,1,0.5": (32, 14)}
CENTRES["0,0.5,1,1"] = (32, 50)


class Painter:
    """Stands for a pipeline: objects in their boxes under `regions`, else always left and right."""

    def __call__(self, prompt, seed, progress, **settings):
        request = world.parse(prompt)
        acting = [m for m in self.methods if isinstance(m, Regions)]
        boxes = acting[0].regions.split("; ") if acting else LAYOUTS[0]
        places = [CENTRES[box.partition(":")[0]] for box in boxes]
        things = tuple(
            world.SceneObject(o.color, o.shape, *place, 8)
            for o, place in zip(request.objects, places, strict=True)
        )
        scene = world.Scene(things, request.background or "white")
        return SimpleNamespace(images=[Image.fromarray(world.draw(scene))])


def test_the_four_layouts_are_halves_in_both_orders():
    assert len(set(LAYOUTS)) == 4 and {box for pair in LAYOUTS for box in pair} == set(CENTRES)


def test_objects_inside_are_counted():
    prompts = region_prompts("val", 8)
    requests = [world.parse(prompt) for prompt in prompts]
    assert len(set(prompts)) == 8
    assert all(len(r.objects) == 2 and r.relation is None for r in requests)
    plain, steered = evaluate_regions(Painter(), prompts, [None, Regions(stop=0.5)])
    assert (plain["inside"], plain["anywhere"]) == (0.5, 1.0)  # by chance
    assert (steered["inside"], steered["anywhere"]) == (1.0, 1.0)
    assert steered["variant"] == "scale=0.5 stop=0.5" and steered["objects"] == 16
    text = as_markdown([plain, steered])
    assert "| none | 16 | 50.0 (" in text and text.count("\n") == 4


def test_regions_name_the_phrases_of_the_prompt():
    request = world.parse("a small red circle and a blue ring")
    assert regions_of(request, LAYOUTS[1]) == "0.5,0,1,1: small red circle; 0,0,0.5,1: blue ring"
