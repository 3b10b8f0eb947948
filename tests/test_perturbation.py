"""Every perturbation of a head against whole attention maps in float64."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import dittune
from dittune import perturbation
from dittune.call import AttnCall, Site, TokenLayout
from dittune.methods.softpag import PERTURBATIONS
from dittune.run import Run

# grid, text tokens, text first
LAYOUTS = [((1, 3, 5), 7, False), ((1, 1, 4), 0, False), ((1, 5, 2), 3, True), ((2, 2, 3), 1, True)]


def blur_matrix(grid, sigma):
    """What blurring does to the image tokens, `[image, image]`: rows are weights."""
    if math.isinf(sigma):
        count = math.prod(grid)
        return torch.full((count, count), 1 / count, dtype=torch.float64)
    one_d = []
    for side in grid[1:]:
        radius = min(math.ceil(6 * sigma) // 2, (side - 1) // 2)
        offsets = range(-radius, radius + 1)
        weights = [math.exp(-((o / sigma) ** 2) / 2) for o in offsets]
        matrix = torch.zeros(side, side, dtype=torch.float64)
        for i in range(side):
            for o, weight in zip(offsets, weights, strict=True):
                j = abs(i + o)  # mirrored at the borders, which are not repeated
                j = j if j < side else 2 * (side - 1) - j
                matrix[i, j] += weight / sum(weights)
        one_d.append(matrix)
    return torch.kron(torch.eye(grid[0], dtype=torch.float64), torch.kron(*one_d))


def explicit_map(method, query, key, mask, layout, scale):
    """The map that a perturbed head gets at `u = 1`, `[Sq, Skv]`."""
    image, perturbed = slice(*layout.image), query.clone()
    rows = image if method.rows == "image" else slice(None)
    if method.perturbation == "uniform":
        perturbed[:] = 0
    elif method.perturbation == "mean_query":
        perturbed[:] = query[rows].mean(0)
    elif method.perturbation == "blurred_query":
        perturbed[image] = blur_matrix(layout.grid, method.sigma) @ query[image]
    logits = perturbed @ key.T * scale + mask
    if method.perturbation == "temperature":
        logits = logits / method.temperature
    if method.perturbation == "argmax":
        return torch.eye(len(key), dtype=query.dtype)[logits.argmax(-1)]
    if method.perturbation == "identity":
        return torch.eye(len(key), dtype=query.dtype)
    return torch.softmax(logits, -1)


def explicit(method, call, chosen, mask):
    """Everything through maps, one batch item and one head at a time."""
    out = torch.empty(*call.query.shape[:3], call.value.shape[-1], dtype=torch.float64)
    rows = slice(*call.layout.image) if method.rows == "image" else slice(None)
    scale = call.options.get("scale") or call.query.shape[-1] ** -0.5
    for b in range(call.query.shape[0]):
        for h in range(call.query.shape[1]):
            query, key = call.query[b, h], call.key[b, h]
            here = mask[b if len(mask) > 1 else 0, h if mask.shape[1] > 1 else 0]
            attn = torch.softmax(query @ key.T * scale + here, -1)
            if h in chosen:
                goal = explicit_map(method, query, key, here, call.layout, scale)
                attn[rows] = (1 - method.u) * attn[rows] + method.u * goal[rows]
            out[b, h] = attn @ call.value[b, h]
    return out


def make_call(method, grid, text, text_first, mask=None, scale=None, cross=0):
    image, heads = math.prod(grid), 4
    total = image + text
    generator = torch.Generator().manual_seed(11)

    def random(tokens):
        return torch.randn(4, heads, tokens, 6, dtype=torch.float64, generator=generator)

    layout = TokenLayout((text, total), (0, text), grid)
    if not text_first:
        layout = TokenLayout((0, image), (image, total), grid)
    if cross:
        layout = TokenLayout((0, image), (image, image), grid)
    site = Site(0, "cross" if cross else "joint", "block", heads)
    keys = cross or total
    options = {} if scale is None else {"scale": scale}
    if mask is not None:
        options["attn_mask"] = mask

    def core(call):
        return scaled_dot_product_attention(call.query, call.key, call.value, **call.options)

    return AttnCall(
        random(image if cross else total), random(keys), random(keys), options, ("cond", method),
        layout, site, method.site_state(site, torch.device("cpu")), core, Run(),
    )  # fmt: skip


def check(method, call, chosen, mask=None):
    out = method.attend(call, lambda c: c.core(c))
    plain = call.core(call)
    ours = call.take_rows(2, 4)
    if mask is None:
        mask = torch.zeros(1, 1, ours.query.shape[2], ours.key.shape[2], dtype=torch.float64)
    wanted = explicit(method, ours, chosen, mask[2:] if len(mask) > 1 else mask)
    assert torch.equal(out[:2], plain[:2])
    assert (out[2:] - wanted).abs().max() < 1e-10
    others = [head for head in range(4) if head not in chosen]
    assert (out[2:, others] - plain[2:, others]).abs().max() < 1e-12 if others else True
    assert (out[2:, chosen] - plain[2:, chosen]).abs().max() > 1e-4


@pytest.mark.parametrize("name", PERTURBATIONS)
@pytest.mark.parametrize("rows", ["all", "image"])
@pytest.mark.parametrize("u", [0.3, 1.0])
@pytest.mark.parametrize(("grid", "text", "text_first"), LAYOUTS)
def test_equals_the_explicit_map(name, rows, u, grid, text, text_first):
    for chosen, scale in (([2], None), ([3, 0], 0.7), ([0, 1, 2, 3], None)):
        heads = ",".join(f"0:{head}" for head in chosen)
        method = dittune.SoftPAG(heads=heads, perturbation=name, rows=rows, u=u, sigma=0.6)
        check(method, make_call(method, grid, text, text_first, scale=scale), chosen)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5, 30.0, math.inf])
@pytest.mark.parametrize("grid", [(1, 6, 9), (3, 4, 5)])
def test_blurs_of_any_width(sigma, grid):
    method = dittune.SoftPAG(heads="0:1,0:2", perturbation="blurred_query", sigma=sigma)
    call = make_call(method, grid, 3, False)
    check(method, call, [1, 2])
    out = method.attend(call, lambda c: c.core(c))[2:]
    image = out[:, 1:3, slice(*call.layout.image)]
    if math.isinf(sigma):
        assert (image - image[:, :, :1]).abs().max() < 1e-12
    text = slice(*call.layout.text)
    assert torch.equal(out[:, :, text], call.core(call)[2:, :, text])


def test_a_narrow_blur_changes_nothing():
    method = dittune.SoftPAG(heads="0:*", perturbation="blurred_query", sigma=0.01)
    call = make_call(method, (1, 4, 5), 2, False)
    out = method.attend(call, lambda c: c.core(c))
    torch.testing.assert_close(out, call.core(call), atol=1e-12, rtol=0)


@pytest.mark.parametrize("tau", [0.25, 3.0])
def test_temperatures(tau):
    method = dittune.SoftPAG(heads="0:1", perturbation="temperature", temperature=tau)
    check(method, make_call(method, (1, 3, 4), 5, False), [1])


@pytest.mark.parametrize("name", [name for name in PERTURBATIONS if name != "identity"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 17), (4, 1, 1, 17), (4, 4, 17, 17), (1, 1, 17, 17)])
def test_masks_and_biases_stay_in_force(name, shape):
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(shape, dtype=torch.float64, generator=generator)
    hidden = torch.rand(shape, generator=generator) < 0.3
    hidden[..., 0] = False
    for mask in (bias, ~hidden):
        method = dittune.SoftPAG(heads="0:0,0:3", perturbation=name, u=0.8, sigma=0.7)
        call = make_call(method, (1, 3, 4), 5, False, mask=mask)
        as_bias = mask
        if mask.dtype == torch.bool:
            as_bias = torch.zeros(shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
        check(method, call, [0, 3], as_bias.expand(*shape[:2], 17, 17))


@pytest.mark.parametrize("name", [name for name in PERTURBATIONS if name != "identity"])
def test_cross_attention_has_other_keys_than_queries(name):
    method = dittune.SoftPAG(heads="0:0,0:2", perturbation=name, kind="cross", u=1.0)
    check(method, make_call(method, (1, 3, 4), 0, False, cross=5), [0, 2])


@pytest.mark.parametrize("as_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 19])
def test_image_columns_leave_out_text_that_is_hidden(rows, as_bias):
    """Hidden padding is as good as cut off; HunyuanVideo and Mochi hide theirs."""
    method = dittune.SoftPAG(heads="0:1", rows="image", cols="image")
    call = make_call(method, (2, 2, 3), 7, False)
    seen = torch.arange(19).expand(1, 1, rows, 19) < 15
    bias = torch.zeros(1, 1, rows, 19, dtype=torch.float64)
    mask = bias.masked_fill(~seen, -torch.inf) if as_bias else seen
    few = call._replace(layout=call.layout._replace(text=(12, 15)))
    ours = perturbation.self_and_text(call._replace(options={"attn_mask": mask}))
    torch.testing.assert_close(ours, perturbation.self_and_text(few), atol=1e-12, rtol=0)
    assert (ours - perturbation.self_and_text(call)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_largest_logit_is_found_in_half_precision(dtype):
    method = dittune.SoftPAG(heads="0:*", perturbation="argmax")
    exact = make_call(method, (1, 20, 30), 40, False)
    rounded = {name: getattr(exact, name).to(dtype) for name in ("query", "key", "value")}
    wanted = perturbation.argmax(exact._replace(**{k: t.double() for k, t in rounded.items()}))
    ours = perturbation.argmax(exact._replace(**rounded))
    assert (ours != wanted).any(-1).sum() <= 1  # of 10240 tokens: float32 may see a tie


def test_argmax_in_pieces_is_argmax(monkeypatch):
    method = dittune.SoftPAG(heads="0:*", perturbation="argmax")
    call = make_call(method, (1, 3, 5), 4, False)
    whole = perturbation.argmax(call)
    monkeypatch.setattr(perturbation, "ARGMAX_LOGITS", 700)
    assert torch.equal(perturbation.argmax(call), whole)


@pytest.mark.parametrize("name", ["uniform", "mean_query"])
def test_one_query_is_asked_once(name):
    """The shortcut is taken: no more than one row of attention a perturbed head."""
    seen = []
    method = dittune.SoftPAG(heads="0:1", perturbation=name)
    call = make_call(method, (1, 3, 5), 4, False)

    def core(inner):
        seen.append(tuple(inner.query.shape[1:3]))
        return call.core(inner)

    method.attend(call._replace(core=core), lambda c: c.core(c))
    assert sorted(seen) == [(1, 1), (3, 19), (4, 19)]
