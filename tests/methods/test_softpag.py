"""SoftPAG against explicit attention maps, explicit guidance arithmetic, and diffusers' own PAG."""

import pytest
import torch
from diffusers import StableDiffusion3PAGPipeline

import dittune
from dittune.call import AttnCall, Site, TokenLayout
from dittune.errors import ConfigError, SelectionError
from dittune.run import Run
from tests.tiny import LAYERS, latents, sd3, sd35

HEADS = 3


def explicit(query, key, value, chosen, u, rows, cols, image, scale=None):
    """The perturbed output through whole `N x N` maps, one head and one item at a time."""
    out = torch.empty_like(value)
    batch, heads, count, dim = query.shape
    first, last = image
    is_image = torch.zeros(count, dtype=torch.bool)
    is_image[first:last] = True
    for b in range(batch):
        for h in range(heads):
            logits = query[b, h] @ key[b, h].T * (scale or dim**-0.5)
            attn = torch.softmax(logits, -1)
            if h in chosen:
                goal = attn.clone()
                for i in range(count):
                    if rows == "image" and not is_image[i]:
                        continue
                    if cols == "image":
                        hidden = is_image.clone()
                        hidden[i] = False
                        goal[i] = torch.softmax(logits[i].masked_fill(hidden, -torch.inf), -1)
                    else:
                        goal[i] = torch.eye(count, dtype=attn.dtype)[i]
                attn = (1 - u) * attn + u * goal
            out[b, h] = attn @ value[b, h]
    return out


def make_call(grid, text, roles, method, text_first=False, scale=None, spy=None, heads=3, size=1):
    image = grid[0] * grid[1] * grid[2]
    total = image + text
    generator = torch.Generator().manual_seed(7)
    query, key, value = (
        torch.randn(size * len(roles), heads, total, 5, dtype=torch.float64, generator=generator)
        for _ in range(3)
    )
    layout = TokenLayout((text, total), (0, text), grid)
    if not text_first:
        layout = TokenLayout((0, image), (image, total), grid)

    def core(call):
        if spy is not None:
            spy.append(call.query.shape)
        return torch.nn.functional.scaled_dot_product_attention(
            call.query, call.key, call.value, **call.options
        )

    site = Site(0, "joint", "block", heads)
    options = {} if scale is None else {"scale": scale}
    roles = tuple(method if role == "softpag" else role for role in roles)
    state = method.site_state(site, torch.device("cpu"))
    return AttnCall(query, key, value, options, roles, layout, site, state, core, Run())


def proceed(call):
    return call.core(call)


@pytest.mark.parametrize("u", [0.3, 1.0])
@pytest.mark.parametrize(("rows", "cols"), [("all", "all"), ("image", "all"), ("image", "image")])
@pytest.mark.parametrize("chosen", [[1], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize(
    ("grid", "text", "text_first"),
    [((1, 3, 5), 7, False), ((1, 1, 4), 0, False), ((1, 5, 2), 3, True), ((2, 2, 3), 1, False)],
)
def test_equals_the_explicit_map_in_float64(grid, text, text_first, chosen, rows, cols, u):
    heads = ",".join(f"0:{head}" for head in chosen)
    method = dittune.SoftPAG(heads=heads, u=u, rows=rows, cols=cols)
    for scale in (None, 0.7):
        call = make_call(
            grid, text, ["uncond", "cond", "softpag"], method, text_first, scale, size=2
        )
        out = method.attend(call, proceed)
        plain = proceed(call)
        assert (out[:4] - plain[:4]).abs().max() < 1e-12
        wanted = explicit(
            call.query[4:], call.key[4:], call.value[4:], chosen, u, rows, cols, call.layout.image,
            scale,
        )  # fmt: skip
        assert (out[4:] - wanted).abs().max() < 1e-10
        assert (out[4:] - plain[4:]).abs().max() > 1e-3


@pytest.mark.parametrize("u", [0.3, 1.0])
@pytest.mark.parametrize(("rows", "cols"), [("all", "all"), ("image", "all"), ("image", "image")])
def test_one_head_and_any_place_in_the_batch(rows, cols, u):
    method = dittune.SoftPAG(heads="0:0", u=u, rows=rows, cols=cols)
    for roles in (["softpag"], ["softpag", "cond"], ["uncond", "softpag", "cond"]):
        call = make_call((1, 2, 3), 5, roles, method, heads=1, size=3)
        out, wanted = method.attend(call, proceed), proceed(call)
        first, last = call.chunk_of(method)
        assert last - first == 3
        wanted[first:last] = explicit(
            call.query[first:last], call.key[first:last], call.value[first:last],
            [0], u, rows, cols, call.layout.image,
        )  # fmt: skip
        assert (out - wanted).abs().max() < 1e-10


def test_at_full_strength_chosen_heads_compute_no_attention():
    method = dittune.SoftPAG(heads="0:0,0:2", u=1.0)
    spy = []
    call = make_call((1, 3, 3), 2, ["cond", "softpag"], method, spy=spy)
    out = method.attend(call, proceed)
    assert sorted(shape[1] for shape in spy) == [1, HEADS]  # the kept head; the plain rows
    assert torch.equal(out[1, [0, 2]], call.value[1, [0, 2]])
    every = dittune.SoftPAG(heads="0:*", u=1.0)
    spy.clear()
    call = make_call((1, 3, 3), 2, ["softpag"], every, spy=spy)
    assert torch.equal(every.attend(call, proceed), call.value) and not spy


def test_affine_in_u():
    outs = []
    for u in (0.2, 0.5, 0.8):
        method = dittune.SoftPAG(heads="0:1", u=u)
        outs.append(method.attend(make_call((1, 2, 3), 3, ["softpag"], method), proceed))
    torch.testing.assert_close(outs[1], (outs[0] + outs[2]) / 2)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_guidance_is_the_formula_of_the_paper(guidance_scale):
    """`uncond + g (cond - uncond) + w (cond - perturbed)`, from three separate denoiser calls."""
    pipe = sd3()
    method = dittune.SoftPAG(heads="1:*", scale=2.5)
    with dittune.attach(pipe, method):
        ours = latents(pipe, steps=1, guidance_scale=guidance_scale)
    seen = {}

    def keep(module, args, kwargs, output):
        seen.setdefault("kwargs", kwargs)

    hook = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    latents(pipe, steps=1, guidance_scale=guidance_scale)
    hook.remove()
    kwargs = {k: v for k, v in seen["kwargs"].items() if isinstance(v, torch.Tensor)}
    rows = [slice(0, 1), slice(1, 2)] if guidance_scale > 1 else [slice(0, 1)]
    with torch.no_grad():
        parts = [
            pipe.transformer(**{k: v[r] for k, v in kwargs.items()}, return_dict=False)[0]
            for r in rows
        ]
        stock = torch.nn.functional.scaled_dot_product_attention
        attn = pipe.transformer.transformer_blocks[1].attn
        attn.processor = _ValueOnly()
        cond = {k: v[rows[-1]] for k, v in kwargs.items()}
        perturbed = pipe.transformer(**cond, return_dict=False)[0]
    assert torch.nn.functional.scaled_dot_product_attention is stock
    velocity = parts[-1] + 2.5 * (parts[-1] - perturbed)
    if guidance_scale > 1:
        velocity = velocity + (guidance_scale - 1) * (parts[1] - parts[0])
    noise = kwargs["hidden_states"][rows[-1]]
    sigmas = pipe.scheduler.sigmas
    torch.testing.assert_close(
        ours, noise + (sigmas[1] - sigmas[0]) * velocity, atol=1e-4, rtol=1e-4
    )


class _ValueOnly:
    """A joint attention whose map is the identity: out-projections of the values."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        image = attn.to_out[0](attn.to_v(hidden_states))
        return image, attn.to_add_out(attn.add_v_proj(encoder_hidden_states))


def test_one_batch_and_a_pass_of_its_own_agree():
    pipe = sd3()
    results = {}
    for batched in (True, False):
        with dittune.attach(pipe, dittune.SoftPAG(heads="0:1,1:*", batched=batched)) as handle:
            results[batched] = latents(pipe, prompt=["a red circle", "a blue square"])
            assert handle.report()["softpag"]["batched"] is batched
    torch.testing.assert_close(results[True], results[False], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batched", [None, True])
def test_out_of_memory_falls_back_to_a_pass_of_its_own(batched):
    pipe = sd3()
    method = dittune.SoftPAG(heads="0:1", batched=batched)
    with dittune.attach(pipe, dittune.SoftPAG(heads="0:1", batched=False)):
        wanted = latents(pipe)
    rows = []

    def too_large(module, args, kwargs):
        rows.append(len(kwargs["hidden_states"]))
        if rows[-1] > 2:
            raise torch.OutOfMemoryError("too large")

    pipe.transformer.register_forward_pre_hook(too_large, with_kwargs=True)
    with dittune.attach(pipe, method) as handle:
        if batched:
            with pytest.raises(torch.OutOfMemoryError):
                latents(pipe)
            return
        torch.testing.assert_close(latents(pipe), wanted, atol=1e-4, rtol=1e-4)
        assert handle.report()["softpag"]["batched"] is False
    assert rows == [3, 2, 1, 2, 1]  # tried once, then not again in this generation


def test_start_and_stop_limit_the_perturbed_passes():
    pipe = sd3()
    for start, stop, passes in ((0.0, 1.0, 4), (0.5, 1.0, 2), (0.0, 0.25, 1), (0.3, 0.6, 1)):
        with dittune.attach(pipe, dittune.SoftPAG(heads="0:1", start=start, stop=stop)) as handle:
            latents(pipe, steps=4)
            assert handle.report()["softpag"]["perturbed_passes"] == passes


def test_only_the_first_heads_are_used():
    pipe = sd3()
    results = {}
    for heads, first in (("2:1,0:0", None), ("2:1,0:0,1:1", 2), ("2:1,0:0,1:1", None)):
        with dittune.attach(pipe, dittune.SoftPAG(heads=heads, first=first)) as handle:
            results[heads, first] = latents(pipe)
            assert handle.report()["softpag"]["heads"] == (first or len(heads.split(",")))
    assert torch.equal(results["2:1,0:0", None], results["2:1,0:0,1:1", 2])
    assert not torch.equal(results["2:1,0:0", None], results["2:1,0:0,1:1", None])
    assert dittune.SoftPAG(heads="0:0", first=0).is_neutral


def test_two_head_sets_add_up():
    """With one step, the deltas of two methods add: both start from the same latents."""
    pipe = sd3()
    first = dittune.SoftPAG(heads="0:1", scale=2.0)
    second = dittune.SoftPAG(heads="2:0", scale=1.0, u=0.5)
    plain = latents(pipe, steps=1)
    gaps = []
    for methods in ((first,), (second,), (first, second)):
        with dittune.attach(pipe, *methods):
            gaps.append(latents(pipe, steps=1) - plain)
    torch.testing.assert_close(gaps[0] + gaps[1], gaps[2], atol=1e-3, rtol=1e-3)


def test_equals_the_pag_pipeline_of_diffusers():
    """Image rows see themselves and the text, all heads of one layer; without qk-norm, which the
    stock PAG processor leaves out."""
    pipe = sd3(qk_norm=None)
    with dittune.attach(pipe, dittune.SoftPAG(heads="1:*", rows="image", cols="image", scale=3.0)):
        ours = latents(pipe, guidance_scale=4.0)
    names = [name for name in pipe.components if "image_encoder" != name != "feature_extractor"]
    theirs = StableDiffusion3PAGPipeline(
        **{name: pipe.components[name] for name in names}, pag_applied_layers=["blocks.1"]
    )
    theirs.set_progress_bar_config(disable=True)
    reference = latents(theirs, guidance_scale=4.0, pag_scale=3.0)
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-4)


def test_skip_layer_guidance_of_the_pipeline_still_works():
    pipe = sd3()
    settings = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "steps": 4}
    settings["skip_layer_guidance_stop"] = 1.0
    plain, skipping = latents(pipe, steps=4), latents(pipe, **settings)
    assert not torch.equal(skipping, plain)
    with dittune.attach(pipe, dittune.SoftPAG(heads="0:1")) as handle:
        assert not torch.equal(latents(pipe, **settings), skipping)
        assert handle.report()["softpag"]["perturbed_passes"] == 4


@pytest.mark.parametrize("batched", [True, False])
def test_skip_layer_guidance_adds_its_own_term(batched):
    """`cfg + s (cond - skip) + w (cond - perturbed)`: our term is in `cond` and in `skip` alike.

    A recording of the velocities that the scheduler is given: with both methods, without either.
    """
    pipe = sd3()
    settings = {"skip_guidance_layers": [1], "skip_layer_guidance_scale": 1.7, "steps": 2}
    settings |= {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    begin = torch.randn(1, 4, 8, 8)

    def velocity(*methods, **settings):
        """That of the second step (the pipeline never skips in the first), from equal latents."""
        given = []
        step = pipe.scheduler.step

        def record(model_output, timestep, sample, **kwargs):
            given.append(model_output)
            return begin, *step(model_output, timestep, sample, **kwargs)[1:]

        pipe.scheduler.step = record
        try:
            with dittune.attach(pipe, *methods):
                latents(pipe, **settings)
        finally:
            del pipe.scheduler.step
        return given[1]

    method = dittune.SoftPAG(heads="0:1,2:0", scale=2.0, u=0.6, batched=batched)
    plain, skipping = velocity(steps=2), velocity(**settings)
    steered, together = velocity(method, steps=2), velocity(method, **settings)
    assert (skipping - plain).abs().max() > 1e-2 and (steered - plain).abs().max() > 1e-2
    torch.testing.assert_close(together, skipping + steered - plain, atol=1e-4, rtol=1e-4)


def test_the_image_only_attention_of_sd35_has_layers_of_its_own():
    pipe = sd35()
    plain = latents(pipe)
    with dittune.attach(pipe, dittune.SoftPAG(heads="1:0", kind="self")):
        assert not torch.equal(latents(pipe), plain)
    with pytest.raises(SelectionError, match="no layer 2; this model has layers 0 to 1"):
        dittune.attach(pipe, dittune.SoftPAG(heads="2:0", kind="self"))
    with pytest.raises(SelectionError, match="needs self attention; the model has joint"):
        dittune.attach(sd3(), dittune.SoftPAG(heads="0:0", kind="self"))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"u": 1.5}, r"u is in \[0, 1\], got 1.5"),
        ({"u": float("nan")}, r"u is in \[0, 1\], got nan"),
        ({"scale": float("inf")}, "scale is a finite number, got inf"),
        ({"heads": "1-2"}, "layer:head,layer:head"),
        ({"rows": "text"}, "rows is 'all' or 'image'"),
        ({"cols": "image"}, "needs rows='image' and the identity"),
        ({"kind": "cross"}, "the identity needs as many keys as queries"),
        ({"kind": "temporal"}, "kind is one of joint, self, cross"),
        ({"perturbation": "blur"}, "perturbation is one of identity, uniform"),
        ({"perturbation": "uniform", "rows": "image", "cols": "image"}, "and the identity"),
        ({"first": -1}, "first is a number of heads"),
        ({"sigma": 0.0}, "sigma is above 0, got 0.0"),
        ({"temperature": float("inf")}, "temperature is finite"),
        ({"start": 0.8, "stop": 0.2}, "0 <= start <= stop <= 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        dittune.SoftPAG(**settings)


@pytest.mark.parametrize(
    ("heads", "match"),
    [(f"{LAYERS}:0", f"layers 0 to {LAYERS - 1}"), ("0:2", "layer 0 has heads 0 to 1")],
)
def test_heads_the_model_does_not_have_are_refused(heads, match):
    with pytest.raises(SelectionError, match=match):
        dittune.attach(sd3(), dittune.SoftPAG(heads=heads))
