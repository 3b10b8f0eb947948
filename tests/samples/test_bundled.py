"""The bundled checkpoints are ordinary diffusers folders, and the README's first example runs."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

import dittune
from dittune.pipelines.arguments import guidance, makes_videos
from dittune.pipelines.scorers import scorer_for


@pytest.mark.parametrize("name", dittune.available_checkpoints())
def test_it_is_small_and_names_no_machine(name):
    folder = Path(dittune.checkpoint(name))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16 * 2**20
    assert {"README.md", "model_index.json"} <= {path.name for path in files}
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        assert "_name_or_path" not in content
        assert not [v for v in content.values() if isinstance(v, str) and v.startswith("/")]


@pytest.mark.parametrize("name", dittune.available_checkpoints())
def test_diffusers_alone_loads_and_runs_it(name):
    pipe = DiffusionPipeline.from_pretrained(dittune.checkpoint(name))
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 1, "height": 64, "width": 64}
    if makes_videos(pipe):
        assert pipe("a red circle", num_frames=9, **settings).frames.shape == (1, 9, 64, 64, 3)
    else:
        assert pipe("a red circle", **settings).images[0].size == (64, 64)


@pytest.mark.parametrize("name", dittune.available_checkpoints())
def test_it_draws_what_it_is_asked_for(name):
    pipeline = dittune.Pipeline.from_pretrained(name)
    scorer = scorer_for(pipeline.pipe)
    settings = {"num_inference_steps": 10, "height": 64, "width": 64}
    if scorer.modality == "video":
        prompt = "a red circle moving right"
        settings |= {"num_frames": 9, "output_type": "pil"}
    else:
        prompt = "a red circle"
    settings |= guidance(pipeline.pipe, 3.5)
    (made,) = pipeline(prompt, seed=0, **settings).images
    assert scorer.judge(made, prompt).success


def test_the_first_example_of_the_readme():
    pipe = StableDiffusion3Pipeline.from_pretrained(dittune.checkpoint("shapes-sd3"))
    pipe.set_progress_bar_config(disable=True)

    def image():
        generator = torch.Generator().manual_seed(7)
        return pipe("a red circle and a blue square", num_inference_steps=4, generator=generator)

    plain = image().images[0]
    assert plain.size == (64, 64)
    with dittune.attach(pipe, dittune.SoftPAG(heads="1:*", u=1.0, scale=2.0)):
        steered = image().images[0]
    assert steered != plain and image().images[0] == plain
