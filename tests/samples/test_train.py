"""Training is resumable, and its one shortcut is exact."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import dittune
from dittune.samples.shapes import bundle_sd3, data, loss_curve, models, train_denoiser, world
from dittune.samples.shapes.trainer import Trainer, lr_factor
from tests.tiny import randomise


def make(work, steps):
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 1)

    def loss_fn(step):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        loss = (module(x) - x.sum(1, keepdim=True)).square().mean()
        return {"loss": loss, "part": loss / 2}

    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    return Trainer(module, [optimizer], loss_fn, work, steps)


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole = make(tmp_path / "whole", 100)
    whole.run()
    first = make(tmp_path / "parts", 100)
    loss_fn = first.loss_fn

    def stop(step):
        if step == 40:
            first.save()
        if step == 60:  # killed with a line in the log for steps that are not saved
            raise KeyboardInterrupt
        return loss_fn(step)

    first.loss_fn = stop
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = make(tmp_path / "parts", 100)
    second.run()
    assert second.step == 100
    for key, value in whole.ema.items():
        assert torch.equal(second.ema[key], value)
        assert torch.equal(second.module.state_dict()[key], whole.module.state_dict()[key])
    curves = loss_curve.read_log(tmp_path / "parts" / "loss.csv")
    assert [step for step, _ in curves["loss"]] == [50, 100]
    assert curves["loss"][1][1] < curves["loss"][0][1]
    assert loss_curve.draw(curves, "linear").count("<polyline") == 1


def test_gradients_of_any_memory_format_are_averaged(tmp_path, monkeypatch):
    module = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    module(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)).square().sum().backward()
    wanted = [p.grad.clone() for p in module.parameters()]
    assert not wanted[0].is_contiguous()
    trainer = Trainer(module, [torch.optim.SGD(module.parameters())], None, tmp_path, 1)
    trainer.world_size = 4
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flat: flat.mul_(8))
    trainer._average_gradients()
    for parameter, before in zip(module.parameters(), wanted, strict=True):
        assert torch.equal(parameter.grad, 2 * before)


def test_the_learning_rate_warms_up_stays_and_decays_to_zero():
    factors = [lr_factor(step, 1000) for step in range(1001)]
    assert factors[0] == 0.01 and factors[99] == factors[700] == 1.0 and factors[1000] == 0.0
    assert all(b <= a for a, b in itertools.pairwise(factors[100:]))


def test_one_weighted_padding_token_is_exactly_256_of_them():
    torch.manual_seed(0)
    transformer = models.build_sd3_transformer(64, 3)
    randomise(transformer)
    transformer.double().eval()
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16, dtype=torch.float64),
        "pooled_projections": torch.randn(2, 128, dtype=torch.float64),
        "timestep": torch.tensor([300.0, 900.0], dtype=torch.float64),
    }
    text = torch.randn(2, models.CAPTION_TOKENS, 128, dtype=torch.float64)

    def call(zeros):
        padded = torch.cat([text, torch.zeros(2, zeros, 128, dtype=torch.float64)], 1)
        with torch.no_grad():
            return transformer(encoder_hidden_states=padded, return_dict=False, **inputs)[0]

    wanted, unweighted = call(bundle_sd3.T5_TOKENS), call(1)
    bundle_sd3.install_padding_weight(transformer)
    found = call(1)
    assert (found - wanted).abs().max() < 1e-4 < (unweighted - wanted).abs().max()


def test_token_labels_are_shares():
    scene = world.sample_scene(np.random.default_rng(0), 3)
    labels = data.token_labels(scene)
    assert labels.shape == (64, data.LABELS)
    np.testing.assert_allclose(labels[:, : data.COLOR_LABELS].sum(1), 1, atol=1e-3)
    colors = list(world.COLORS)
    for thing in scene.objects:
        area = labels[:, colors.index(thing.color)].sum() * 64
        wanted = world.coverage(thing.shape, thing.x, thing.y, thing.radius, 64).sum()
        assert area == pytest.approx(wanted, rel=1e-3)


def test_the_tokenizer_knows_every_word_of_the_world(tmp_path):
    tokenizer = models.build_tokenizer()
    assert all(len(tokenizer.tokenize(word)) == 1 for word in world.vocabulary())
    rng = np.random.default_rng(1)
    for _ in range(200):
        caption = world.caption(world.sample_scene(rng), rng)
        assert len(tokenizer(caption).input_ids) <= models.CAPTION_TOKENS
    text = "Zebra, 3 = drei"
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again(text).input_ids == tokenizer(text).input_ids


def test_the_silent_t5_says_nothing():
    out = models.build_silent_t5()(torch.randint(0, 4, (1, 9))).last_hidden_state
    assert out.shape == (1, 9, 128) and torch.equal(out, torch.zeros_like(out))


def test_a_training_can_start_from_the_bundled_weights(tmp_path):
    folder = Path(dittune.checkpoint("shapes-sd3"))
    bundle = bundle_sd3.SD3Bundle()
    train_denoiser.load_weights(bundle, folder)
    bundled = type(bundle.transformer).from_pretrained(folder / "transformer")
    for name, value in bundled.state_dict().items():
        assert torch.equal(bundle.transformer.state_dict()[name], value)
    scenes = data.SceneLatents(tmp_path, folder / "vae", count=200)
    latents, texts, labels = scenes.batch(16, np.random.default_rng(0))
    assert latents.shape == (16, 4, 16, 16) and abs(latents.std() - 1) < 0.3
    assert len(texts) == 16 and labels.shape == (16, 64, data.LABELS)
    other = Path(dittune.checkpoint("shapes-sd3-marked")) / "vae"  # the same work, another encoder
    assert not torch.equal(data.SceneLatents(tmp_path, other, count=200).latents, scenes.latents)
