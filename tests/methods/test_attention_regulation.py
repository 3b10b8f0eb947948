"""Attention Regulation: the bumps, the small optimisation, and what it does to a call."""

import math

import pytest
import torch

import dittune
from dittune import AttentionRegulation
from dittune.call import AttnCall, Site, TokenLayout
from dittune.errors import ConfigError
from dittune.methods.attention_regulation import bumps, solve
from dittune.run import Run
from dittune.seam import _sdpa_core
from dittune.words.tokens import PromptWords
from tests.tiny import FAMILIES, latents, sd, sd3

TWO = "a red circle and a blue square"


@pytest.mark.parametrize(
    ("grid", "count"),
    [((16, 16), 49), ((64, 64), 49), ((8, 16), 3 * 7), ((4, 4), 1), ((2, 1), 1), ((12, 20), 45)],
)
def test_bumps_fit_the_grid(grid, count):
    fields = bumps(*grid)
    assert fields.shape == (count, grid[0] * grid[1])
    assert fields.max() <= 1 and (fields.amax(1) > 0.6).all()


def test_the_first_bump_of_the_papers_grid():
    first = bumps(16, 16)[0].view(16, 16)
    assert first[2, 2] == 1
    assert first[2, 4].item() == first[4, 2].item() == pytest.approx(math.exp(-2))
    assert bumps(16, 32)[1].view(16, 32)[2, 8] == 1  # sigma 2 along the longer side


@pytest.mark.parametrize("rate", [2.0, 1e4])
def test_the_best_iteration_is_kept(rate):
    torch.manual_seed(0)
    text, member = torch.randn(2, 64, 7), torch.zeros(2, 7)
    member[0, 1] = member[1, [3, 4]] = 1
    found = [solve(text, member, bumps(8, 8), rate, n) for n in range(1, 12)]
    lowest = [losses[1].item() for _, losses in found]
    assert lowest == sorted(lowest, reverse=True)
    assert all(losses[0] == found[0][1][0] for _, losses in found)
    assert rate > 1e3 or lowest[-1] < lowest[0]
    assert torch.equal(found[0][0], (0.5 * bumps(8, 8).sum(0)).expand(2, 2, 64))


JOINT = TokenLayout((2, 14), (14, 20), (1, 3, 4)), "joint", 21  # others before and after
CROSS = TokenLayout((0, 12), (0, 6), (1, 3, 4)), "cross", 12
WORDS = PromptWords((1, 2, 3), (((1,), (2, 3)),))


def setting(kind, batch=3, mask=False, scale=1.0):
    layout, name, queries = kind
    keys = queries if name == "joint" else 6
    torch.manual_seed(1)
    query = torch.randn(batch, 2, queries, 8)
    key, value = torch.randn(2, batch, 2, keys, 8)
    options = {"attn_mask": torch.randn(1, 1, 1, keys)} if mask else {}
    run = Run()
    call = AttnCall(
        query, key, value, options, ("cond",), layout,
        Site(0, name, "there", 2), None, _sdpa_core, run,
    )  # fmt: skip
    method = AttentionRegulation(scale=scale)
    memory = run.memory(method)
    memory.words = [WORDS, PromptWords((), ()), WORDS]
    memory.solved, memory.losses = {}, []
    return method, call, memory


def attend(method, call):
    return method.attend(call, lambda given: given.core(given))


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", [JOINT, CROSS], ids=["joint", "cross"])
def test_the_solution_is_added_to_the_words_columns_only(kind, mask):
    """Against the formula, on whole maps."""
    method, call, memory = setting(kind, mask=mask)
    plain = _sdpa_core(call)
    out = attend(method, call)
    first, last = call.layout.image
    torch.testing.assert_close(out[:, :, :first], plain[:, :, :first])
    torch.testing.assert_close(out[:, :, last:], plain[:, :, last:])
    assert torch.equal(out[1], plain[1])  # no words
    assert (out[0] - plain[0]).abs().max() > 0.01
    start = call.layout.text[0]
    for picture in (0, 2):
        logits = torch.einsum("hqd,hkd->hqk", call.query[picture], call.key[picture]) / 8**0.5
        logits = logits + call.options.get("attn_mask", torch.zeros(1))[0]
        added = memory.solved[call.site, picture, call.layout.grid]  # (H, W, N)
        raised = logits.clone()
        for word, tokens in enumerate(WORDS.words):
            for token in tokens:
                raised[:, first:last, start + token] += added[:, word]
        maps = raised.softmax(-1)
        if call.site.kind == "cross":
            before = logits.softmax(-1)
            maps[..., 0], maps[..., 4] = before[..., 0], before[..., 4]  # start, end of the text
        expected = maps[:, first:last] @ call.value[picture]
        torch.testing.assert_close(out[picture, :, first:last], expected, rtol=1e-4, atol=1e-5)


def test_only_conditional_rows_are_changed():
    method, call, _ = setting(CROSS, batch=6)
    call = call._replace(roles=("uncond", "cond"))
    out, plain = attend(method, call), _sdpa_core(call)
    assert torch.equal(out[:3], plain[:3])
    assert not torch.equal(out[3], plain[3]) and torch.equal(out[4], plain[4])
    other = call._replace(roles=("uncond", "skip"))
    assert torch.equal(attend(method, other), plain)


def test_steps_are_blended_by_site_and_fade():
    method, call, memory = setting(CROSS, batch=1)
    solutions, changes = [], []
    for step in range(3):
        call.run.step = step
        given = call._replace(query=call.query + step)
        added = method._added(given, 0, given.query[0, :, :, :6], torch.eye(6)[1:3])
        solutions.append(memory.solved[call.site, 0, call.layout.grid])
        changes.append(added)
    other = call._replace(site=Site(1, "cross", "elsewhere", 2))
    method._added(other, 0, call.query[0, :, :, :6], torch.eye(6)[1:3])
    assert len(memory.solved) == 2
    torch.testing.assert_close(changes[0], solutions[0])
    for step in (1, 2):
        expected = 0.99**step * (0.25 * solutions[step - 1] + 0.75 * solutions[step])
        torch.testing.assert_close(changes[step], expected)
    assert not torch.equal(solutions[0], solutions[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_a_batch_do_not_depend_on_each_other(family):
    pipe, prompts = FAMILIES[family](), [TWO, "of and the"]
    settings = {"max_sequence_length": 16} if family == "flux" else {}
    method = AttentionRegulation(iterations=4)
    with dittune.attach(pipe, method) as handle:
        together = latents(pipe, prompts, num_images_per_prompt=2, steps=2, **settings)
        solved = handle.report()["attention_regulation"]["solved"]
        assert solved == 2 * len(handle._models[0].installed)  # two pictures, one step
        alone = [latents(pipe, prompts[i // 2], seed=i, steps=2, **settings)[0] for i in range(4)]
    plain = latents(pipe, prompts, num_images_per_prompt=2, steps=2, **settings)
    for i in range(4):
        plain_alone = latents(pipe, prompts[i // 2], seed=i, steps=2, **settings)[0]
        change = (alone[i] - plain_alone).abs().max().item()
        rounding = (plain[i] - plain_alone).abs().max().item()
        assert (together[i] - alone[i]).abs().max().item() <= 0.01 * change + 3 * rounding
        assert change > 10 * rounding if i < 2 else change == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family, dtype):
    pipe = FAMILIES[family]().to(dtype)
    plain = latents(pipe, TWO)
    with dittune.attach(pipe, AttentionRegulation()) as handle:
        result = latents(pipe, TWO)
        report = handle.report()["attention_regulation"]
    assert result.dtype == dtype and result.isfinite().all()
    assert not torch.equal(result, plain)
    assert report["loss_after"] <= report["loss_before"]


@pytest.mark.parametrize("build", [sd3, sd])
def test_a_prompt_of_one_concept_is_left_alone_unless_it_is_asked_for(build):
    pipe = build()
    plain = latents(pipe, "a red circle")
    for concepts, alone in (("", True), ("circle", False)):
        with dittune.attach(pipe, AttentionRegulation(concepts=concepts)):
            assert torch.equal(latents(pipe, "a red circle"), plain) == alone


@pytest.mark.parametrize("build", [sd3, sd])
def test_beside_softpag_and_a_latent_step_in_any_order(build):
    pipe, results = build(), []
    methods = [
        AttentionRegulation(iterations=3),
        dittune.SoftPAG(heads="0:1,1:0", scale=1.0),
        dittune.AStar(scale=2.0),
    ]
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        with dittune.attach(pipe, *(methods[i] for i in order)) as handle:
            results.append(latents(pipe, TWO, guidance_scale=3.0))
            report = handle.report()
        assert report["attention_regulation"]["solved"] > 0 and report["a_star"]["updates"] == 2
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(results[2], results[0], rtol=1e-3, atol=1e-3)
    with dittune.attach(pipe, *methods[1:]):
        assert (latents(pipe, TWO, guidance_scale=3.0) - results[0]).abs().max() > 1e-3


def test_merged_padding_comes_after_it():
    pipe = sd3()
    ours, merge = AttentionRegulation(), dittune.load_method("merge_padding")()
    with dittune.attach(pipe, ours):
        expected = latents(pipe, TWO)
    with dittune.attach(pipe, ours, merge):
        torch.testing.assert_close(latents(pipe, TWO), expected, rtol=1e-3, atol=1e-3)


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match="attention_regulation: scale is a finite number, got in"):
        AttentionRegulation(scale=math.inf)
    with pytest.raises(ConfigError, match="iterations is a number from 1 on, got 0"):
        AttentionRegulation(iterations=0)


def test_nothing_is_reported_where_nothing_was_done():
    assert AttentionRegulation().report(Run()) == {"solved": 0}
