"""Isolation and reposition, against masks and hidden states moved by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb

import dittune
from dittune.errors import ConfigError, SelectionError, UnsupportedModelError
from dittune.methods.isolation import Isolation, reposition
from dittune.models import facts_for, sd3
from dittune.subjects.row_groups import attend_by_plans
from tests.subjects.test_row_groups import GRID, LAYOUTS, PICTURES, call_of, core, dense
from tests.tiny import FAMILIES, denoiser, latents

PROMPTS = ["a red circle", "a blue square", "a red circle and a blue square"]
SUBJECTS = "red circle, blue square"
BOXES = "0,0,0.5,1: red circle; 0.5,0,1,1: blue square"


def masks_on_grid(*places):
    """Bool `[S, 2, 3]` from lists of tokens."""
    masks = torch.zeros(len(places), 6, dtype=torch.bool)
    for mask, tokens in zip(masks, places, strict=True):
        mask[list(tokens)] = True
    return masks.reshape(-1, *GRID[1:])


MASKS = [masks_on_grid([0, 1, 4], []), masks_on_grid([], [2, 5]), masks_on_grid([0, 3], [1, 2, 4])]


def run_plan(method, call, masks=MASKS, shares=True):
    call.run.host = SimpleNamespace(facts=sd3, model=None)
    draw = torch.Generator().manual_seed(0)
    plans = [method.plan(i, call, masks, shares, draw) for i in range(PICTURES)]
    return [plan for plan in plans if plan is not None]


@pytest.mark.parametrize("bias", [0.0, 1.5])
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_target_sees_its_subjects_in_the_references_and_not_each_other(
    name, isolate, shares, bias
):
    call = call_of(name)
    first, length = call.layout.image[0], call.query.shape[2]
    settings = {"subjects": SUBJECTS, "references": 2, "keep": 1.0, "bias": bias}
    method = Isolation(**settings, isolate=isolate, reposition=False)
    plans = run_plan(method, call, shares=shares)
    if not (shares or isolate):
        assert plans == []
        return
    foreign = [(0, torch.tensor([0, 1, 4])), (1, torch.tensor([2, 5]))] if shares else []
    allowed = torch.ones(length, length, dtype=torch.bool)
    extra = torch.zeros(length, 5, dtype=torch.bool)
    for row in (0, 3):
        extra[first + row, :3] = True
        if isolate:
            allowed[first + row, [first + k for k in (1, 2, 4)]] = False
    for row in (1, 2, 4):
        extra[first + row, 3:] = True
        if isolate:
            allowed[first + row, [first + k for k in (0, 3)]] = False
    extra = extra[:, : 5 * shares]
    added = torch.cat([torch.zeros(length, length), torch.full(extra.shape, bias)], 1)
    wanted = dense(call, 2, torch.cat([allowed, extra], 1), foreign, added)
    out = attend_by_plans(call, plans, core).unflatten(0, (2, PICTURES))
    torch.testing.assert_close(out[:, 2], wanted, atol=1e-12, rtol=1e-12)
    plain = core(call).unflatten(0, (2, PICTURES))
    assert torch.equal(out[:, :2], plain[:, :2])  # references are left alone


def test_dropped_rows_are_isolated_still_but_see_no_reference():
    call = call_of("image first")
    settings = {"subjects": SUBJECTS, "references": 2, "reposition": False}
    alone = run_plan(Isolation(**settings, keep=1.0), call, shares=False)
    lone = attend_by_plans(call, alone, core)
    seen = set()
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        plan = Isolation(**settings, keep=0.5).plan(2, call, MASKS, True, draw)
        out = attend_by_plans(call, [plan], core)
        rows = (out[5] - lone[5]).abs().amax((0, 2)) > 1e-9
        assert not rows[5:].any()  # outside of the subjects nothing is shared
        seen.add(tuple(rows[:5].tolist()))
    assert len(seen) > 2


def test_rows_are_split_only_where_a_reference_shows_the_subject():
    """What is drawn for `keep` matters to rows that would look at a reference."""
    call, settings = call_of("image first"), {"subjects": SUBJECTS, "references": 2}
    for keep in (0.5, 1.0):
        plans = run_plan(Isolation(**settings, keep=keep), call, shares=False)
        assert [len(plan.groups) for plan in plans] == [3]  # two subjects and the rest


def test_one_subject_has_nobody_to_be_kept_from():
    call = call_of("image first")
    one = [masks[:1] for masks in MASKS]
    method = Isolation(subjects="red circle", references=0)
    assert run_plan(method, call, one, shares=False) == []


def test_reposition_within_equal_boxes_is_the_identity():
    mask = torch.tensor([[0, 1, 0, 0], [1, 1, 1, 0]]) > 0
    tokens, shift = reposition(mask, mask)
    assert tokens.tolist() == mask.flatten().nonzero().flatten().tolist()
    assert not shift.any()


def test_reposition_moves_and_stretches():
    source, target = torch.zeros(4, 5) > 0, torch.zeros(4, 5) > 0
    source[0, 0] = source[1, 1] = True  # a diagonal in a box of 2 x 2
    target[2:, 1:] = True  # a box of 2 x 4
    tokens, shift = reposition(source, target)
    assert tokens.tolist() == [0, 0, 6, 6]
    assert shift.tolist() == [[2, 1], [2, 2], [2, 2], [2, 3]]
    places = [(int(t) // 5 + int(dy), int(t) % 5 + int(dx)) for t, (dy, dx) in zip(tokens, shift)]
    assert places == [(2, 1), (2, 2), (3, 3), (3, 4)]


class Catch(dittune.Method):
    """Keeps the call of one site."""

    def attend(self, call, proceed):
        CAUGHT.setdefault(call.site.kind, call)
        return proceed(call)


CAUGHT: dict = {}


@pytest.mark.parametrize("family", ["sd3", "flux", "sd", "sdxl"])
def test_moved_keys_are_the_keys_of_moved_hidden_states(family):
    """Keys are read once more from hidden states rearranged, as the paper does."""
    pipe, inside = FAMILIES[family](), {}
    model = denoiser(pipe)
    facts = facts_for(model)
    site = next(s for s in facts.sites(model) if s.kind in ("joint", "self"))
    attn = model.get_submodule(site.name)
    hook = attn.to_k.register_forward_pre_hook(lambda _, args: inside.setdefault("hidden", args[0]))
    CAUGHT.clear()
    with dittune.attach(pipe, Catch()):
        latents(pipe, steps=1, guidance_scale=1.0)
    hook.remove()
    call = CAUGHT[site.kind]
    _, height, width = call.layout.grid
    source, target = (torch.zeros(height, width, dtype=torch.bool) for _ in range(2))
    source[0, :2], target[1:3, -3:] = True, True
    tokens, shift = reposition(source, target)
    hidden = inside["hidden"][:, tokens]
    key = attn.to_k(hidden).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    if family == "flux":
        old = torch.stack([tokens // width, tokens % width], 1)
        ids = torch.cat([torch.zeros(len(tokens), 1), (old + shift).float()], 1)
        key = apply_rotary_emb(key, model.pos_embed(ids))
    found = facts.move_keys(model, call.key[:, :, call.layout.image[0] + tokens], shift)
    torch.testing.assert_close(found, key, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["sd3.5", "flux", "sd"])
def test_what_reposition_does_to_a_picture(family):
    """It moves keys where they have places, and elsewhere does nothing if boxes are of one size."""
    pipe = FAMILIES[family]()
    boxes = "0,0,0.5,0.5: red circle @0; 0.5,0.5,1,1: red circle @1"
    results = []
    for moved in (False, True):
        method = Isolation(
            subjects="red circle", masks=boxes, keep=1.0, isolate=False, reposition=moved
        )
        with dittune.attach(pipe, method) as handle:
            results.append(latents(pipe, PROMPTS[:1] * 2))
        assert handle.report()["isolation"]["pictures"] == 2
    plain = latents(pipe, PROMPTS[:1] * 2)
    gap = (results[0] - results[1]).abs().max()
    assert gap > 1e-4 if family == "flux" else gap < 1e-5
    assert (results[0][1] - plain[1]).abs().max() > 1e-4
    torch.testing.assert_close(results[1][0], plain[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"references": 3}, "references=3, but the call makes 3 pictures"),
        ({"subjects": "red circle, green ring"}, "names 'green ring'"),
        ({"references": 1}, "no prompt of the 1 references names 'blue square'"),
        ({"masks": "0,0,1,1: red circle"}, "no mask of 'blue square' in picture 1"),
    ],
)
def test_what_cannot_be_shared_is_refused(settings, says):
    pipe = FAMILIES["sd3"]()
    settings = {"subjects": SUBJECTS, "references": 2, "masks": BOXES, **settings}
    with dittune.attach(pipe, Isolation(**settings)), pytest.raises(ConfigError, match=says):
        latents(pipe, PROMPTS)


def test_a_family_whose_keys_nobody_knows_is_refused():
    call = call_of("image first")
    method = Isolation(subjects=SUBJECTS, references=2)
    plans = run_plan(method, call)
    call.run.host = SimpleNamespace(facts=SimpleNamespace(), model=None)
    with pytest.raises(UnsupportedModelError, match="use isolation with reposition=False"):
        attend_by_plans(call, plans, core)


def test_wrong_settings_are_refused():
    for settings, says in (
        ({"keep": 1.5}, "keep is in"),
        ({"cover": -0.1}, "cover is in"),
        ({"bias": math.nan}, "bias is a finite number"),
        ({"references": -1}, "references is a number"),
        ({"masks": "0,0,1,1: red circle"}, "masks say where subjects are; name those"),
        ({"subjects": "red circle, red+circle"}, "given twice"),
        ({"layers": "x"}, "layers are written"),
    ):
        with pytest.raises(ConfigError, match=says):
            Isolation(**settings)
    with pytest.raises(SelectionError, match="no joint layer 9"):
        dittune.attach(FAMILIES["sd3"](), Isolation(subjects="red circle", layers="9"))
