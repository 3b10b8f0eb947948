"""Shared attention against plain concatenation of keys, and what it leaves alone."""

import pytest
import torch

import dittune
from dittune.methods.isolation import Isolation
from dittune.methods.merge_padding import MergePadding
from dittune.methods.shared_attention import SharedAttention
from dittune.models import facts_for
from dittune.subjects.row_groups import attend_by_plans
from tests.methods.test_isolation import MASKS, PROMPTS, SUBJECTS, run_plan
from tests.subjects.test_row_groups import LAYOUTS, PICTURES, call_of, core, dense
from tests.tiny import FAMILIES, denoiser, latents


@pytest.mark.parametrize("bias", [0.0, -1.5])
@pytest.mark.parametrize("subjects", ["", SUBJECTS])
@pytest.mark.parametrize("name", LAYOUTS)
def test_image_rows_see_the_references(name, subjects, bias):
    """All of them without subjects, which is plain concatenation; else the subjects' tokens."""
    call = call_of(name)
    length = call.query.shape[2]
    masks = MASKS if subjects else []
    method = SharedAttention(subjects=subjects, references=2, keep=1.0, bias=bias)
    out = attend_by_plans(call, run_plan(method, call, masks), core)
    out = out.unflatten(0, (2, PICTURES))
    tokens = {0: [0, 1, 4], 1: [2, 5]} if subjects else {0: range(6), 1: range(6)}
    for picture in range(PICTURES):
        foreign = [(r, torch.tensor(list(t))) for r, t in tokens.items() if r != picture]
        extra = torch.zeros(length, sum(len(t) for _, t in foreign), dtype=torch.bool)
        extra[slice(*call.layout.image)] = True
        allowed = torch.cat([torch.ones(length, length, dtype=torch.bool), extra], 1)
        added = torch.cat([torch.zeros(length, length), torch.full(extra.shape, bias)], 1)
        wanted = dense(call, picture, allowed, foreign, added)
        torch.testing.assert_close(out[:, picture], wanted, atol=1e-12, rtol=1e-12)


def test_where_keys_are_shared():
    def layers(family, **settings):
        model = denoiser(FAMILIES[family]())
        sites = SharedAttention(**settings).sites(facts_for(model).sites(model))
        return {(site.kind, site.layer) for site in sites}

    assert layers("sd3.5") == {("joint", i) for i in range(3)}
    assert layers("sd3", layers="0,2") == {("joint", 0), ("joint", 2)}
    assert layers("sd") == {("self", i) for i in range(3, 7)}  # the later half, the way up
    words = layers("sd", subjects="red circle", layers="6") - {("self", 6)}
    assert words and {kind for kind, _ in words} == {"cross"}


def test_kept_tokens_are_drawn_anew_and_reproducibly():
    call, method = call_of("no text"), SharedAttention(references=1, keep=0.5)

    def drawn(seed):
        plan = method.plan(2, call, [], True, torch.Generator().manual_seed(seed))
        return plan.foreign[0].tokens.tolist() if plan else []

    assert drawn(1) == drawn(1)
    counts = [len(drawn(seed)) for seed in range(40)]
    assert 2 < sum(counts) / 40 < 4 and len(set(counts)) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_follow_the_reference_and_it_stays(family):
    """With maps of its own, hence from the second step on."""
    pipe = FAMILIES[family]()
    plain = latents(pipe, PROMPTS[::2], steps=3)
    with dittune.attach(pipe, SharedAttention(subjects="red circle", keep=1.0)) as handle:
        found = latents(pipe, PROMPTS[::2], steps=3)
    torch.testing.assert_close(found[0], plain[0], atol=1e-5, rtol=1e-4)
    assert (found[1] - plain[1]).abs().max() > 1e-4
    report = handle.report()["shared_attention"]
    assert report["pictures"] == 2 and min(report["masked"]) > 0


def test_merged_padding_stays_exact_beside_it():
    """In double precision, with the padding of a T5 that says nothing."""
    pipe = FAMILIES["sd3"]()
    pipe.transformer.double(), pipe.text_encoder.double(), pipe.text_encoder_2.double()
    pipe.text_encoder_3.double()
    for method in (
        SharedAttention(subjects="red circle", references=1, keep=1.0),
        Isolation(
            subjects=SUBJECTS, references=2, keep=1.0,
            masks="0,0,0.5,1: red circle; 0.5,0,1,1: blue square",
        ),
    ):  # fmt: skip
        results = []
        for methods in ((method,), (MergePadding(), method)):
            with dittune.attach(pipe, *methods):
                results.append(latents(pipe, PROMPTS))
        assert (results[0] - results[1]).abs().max() < 1e-5


def test_passes_may_have_texts_of_different_length():
    """The negative prompt of FLUX is a pass of its own; with merged padding it is shorter."""
    pipe = dittune.Pipeline.from_pretrained("shapes-flux")
    shared = SharedAttention(subjects="red circle", keep=1.0, masks="0,0,0.5,1: red circle")
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    results = []
    for methods in ([MergePadding()], [shared], [MergePadding(), shared]):
        pipe.methods = methods
        prompts = ["a red circle", "a red circle and a blue square"]
        settings = {"true_cfg_scale": 2.0, "negative_prompt": "", **size}
        results.append(pipe(prompts, seed=0, progress=False, **settings).images)
    plain, wanted, found = results
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    assert (found[1] - plain[1]).abs().max() > 0.1
