"""Every family trains, resumes, and becomes a pipeline that computes what training computed."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, DiffusionPipeline

import dittune
from dittune.samples.shapes import (
    bundle_flux,
    bundle_wan,
    clip_data,
    export,
    models,
    models_wan,
    motion,
    train_denoiser,
    train_video_autoencoder,
    world,
)
from dittune.samples.shapes.train_denoiser import AUTOENCODERS, FAMILIES
from tests.tiny import randomise

CAPTION = "a large red circle above a blue square on a white background"
COUNT = 16  # training scenes or clips
# FluxPipeline's own default side is 128 latents, whatever the model; text length stays at 512.
SIZE = {"height": 64, "width": 64}
CALLS = {"sd3": {}, "flux": SIZE, "sd": {}, "wan": {**SIZE, "num_frames": 9}}

# FLUX normalises with torch's RMSNorm, which under autocast is not fused.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A work folder with an autoencoder and a few latents of each kind; that of clips is random."""
    work = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    models_wan.build_autoencoder().save_pretrained(work / "video_autoencoder" / "vae")
    (work / "video_autoencoder" / "loss.csv").write_text("50,loss=1.5,recon=1.5\n")
    for stage, (_, drawn_latents, _) in AUTOENCODERS.items():
        drawn_latents(work, train_denoiser.provide_autoencoder(work, None, stage), COUNT)
    return work


@pytest.fixture
def work(latents, tmp_path):
    return Path(shutil.copytree(latents, tmp_path / "work"))


def train(family, work, **changes):
    settings = {"steps": 2, "batch": 2, "scenes": COUNT, "compiled": False, **changes}
    train_denoiser.train(family, work, **settings)
    return torch.load(work / family / "state.pt", weights_only=True)


def exported(family, work, out):
    """The folder of a random model, and the model as its half precision weights make it."""
    torch.manual_seed(0)
    bundle = FAMILIES[family]()
    randomise(getattr(bundle, bundle.parts[0]))
    (work / family).mkdir()
    torch.save({"ema": bundle.state_dict()}, work / family / "state.pt")
    (work / family / "loss.csv").write_text("50,loss=1.5,label=0.5\n")
    export.export(family, work, out)
    train_denoiser.load_weights(bundle, out)
    return bundle.eval()


@families
def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(family, work, monkeypatch):
    whole = train(family, work)
    shutil.rmtree(work / family)
    step = train_denoiser.Trainer._train_step

    def stop(self):
        if self.step == 1:
            self.save()
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_denoiser.Trainer, "_train_step", stop)
        train(family, work)
    parts = train(family, work)
    assert parts["step"] == whole["step"] == 2
    for key, value in whole["module"].items():
        assert torch.equal(parts["module"][key], value)
        assert torch.equal(parts["ema"][key], whole["ema"][key])
    untrained = FAMILIES[family]()
    assert set(untrained.state_dict()) == set(whole["module"])


def test_a_video_training_begins_with_first_frames(work, monkeypatch):
    seen = []
    prepare = bundle_wan.WanBundle.prepare

    def spy(self, latents, texts, generator):
        seen.append(tuple(latents.shape[1:]))
        return prepare(self, latents, texts, generator)

    monkeypatch.setattr(bundle_wan.WanBundle, "prepare", spy)
    train("wan", work, steps=4, stills=0.5)
    assert seen == [(24, 1, 8, 8)] * 2 + [(24, 3, 8, 8)] * 2


def test_stills_and_marks_are_refused_where_they_mean_nothing(work):
    with pytest.raises(ValueError, match="sd3 makes pictures"):
        train("sd3", work, stills=0.5)
    with pytest.raises(ValueError, match="wan makes clips"):
        train("wan", work, marked=0.5)


@families
def test_a_pipeline_computes_what_training_computed(family, work, tmp_path):
    """Above all it must see the same text, padding included."""
    out = tmp_path / "out"
    bundle = exported(family, work, out)
    pipe = DiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    calls = []
    denoiser = getattr(pipe, bundle.parts[0])
    denoiser.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    pipe(CAPTION, num_inference_steps=1, generator=generator, **CALLS[family])
    _, args, kwargs, (wanted,) = calls[0]
    noisy, timestep = args or (kwargs["hidden_states"], kwargs["timestep"])
    texts = ["", CAPTION][-len(noisy) :]
    level = timestep.expand(len(noisy)) / (1000 if family in ("sd3", "wan") else 1)
    if family in ("flux", "wan"):
        assert kwargs["encoder_hidden_states"].shape[1] == 512

    def text(texts):
        if family == "wan":
            words = models_wan.text_inputs(bundle.tokenizer, texts)
            return *words, bundle_wan.padding_bias(512)
        ids = models.clip_ids(bundle.tokenizer, texts)
        if family != "flux":
            return (ids,)
        return ids, models.t5_ids(bundle.tokenizer_2, texts), bundle_flux.padding_bias(512)

    with torch.no_grad():
        found, _ = bundle(noisy, level, *text(texts))
        other, _ = bundle(noisy, level, *text(["a cross"] * len(texts)))
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
    assert (other - wanted).abs().max() > 1e-2 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["none", "number", "bool", "causal"])
def test_attention_of_the_training_is_that_of_pytorch(kind):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    numbers = torch.randn(2, 1, 5, 7, dtype=torch.float64)
    mask = {"number": numbers, "bool": numbers > -0.3}.get(kind)
    settings = {"attn_mask": mask, "is_causal": kind == "causal", "scale": 0.7}
    core = F.scaled_dot_product_attention
    wanted = core(query, key, value, **settings)
    with train_denoiser.written_out_attention():
        found = F.scaled_dot_product_attention(query, key, value, **settings)
    assert F.scaled_dot_product_attention is core
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)  # its softmax is in float32


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].compiles])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of its compiler
def test_compiled_bf16_gradients_are_as_good_as_eager_ones(family, work):
    """A compiler has miscompiled the autoencoder; where it does so here, do not compile."""
    torch.manual_seed(0)
    bundle = FAMILIES[family]()
    randomise(getattr(bundle, bundle.parts[0]))
    drawn_latents = AUTOENCODERS[bundle.autoencoder][1]
    scenes = drawn_latents(work, work / bundle.autoencoder / "vae", COUNT)
    latents, texts, labels = scenes.batch(4, np.random.default_rng(0))
    inputs, target = bundle.prepare(latents, texts, torch.Generator().manual_seed(0))

    def gradient(forward, enabled):
        bundle.zero_grad(set_to_none=True)
        core = train_denoiser.written_out_attention() if enabled else nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), core:
            prediction, logits = forward(*inputs)
        error = (prediction.float() - target).square().mean()
        (error + 0.2 * train_denoiser.label_loss(logits, labels)).backward()
        return torch.cat([p.grad.flatten() for p in bundle.parameters() if p.grad is not None])

    exact = gradient(bundle, False)
    eager = (gradient(bundle, True) - exact).norm() / exact.norm()
    compiled = (gradient(torch.compile(bundle), True) - exact).norm() / exact.norm()
    assert compiled < 2 * eager < 0.2


@families
def test_an_export_is_an_ordinary_folder(family, work, tmp_path):
    out = tmp_path / "out"
    bundle = exported(family, work, out)
    pipe = DiffusionPipeline.from_pretrained(out)
    assert type(pipe) is type(bundle.pipeline(pipe.vae))
    pipe.set_progress_bar_config(disable=True)
    output = pipe(CAPTION, num_inference_steps=2, output_type="pil", **CALLS[family])
    pictures = output.frames[0] if family == "wan" else output.images
    assert [picture.size for picture in pictures] == [(64, 64)] * (9 if family == "wan" else 1)
    for path in out.rglob("*.json"):
        assert str(work) not in path.read_text() and "_name_or_path" not in path.read_text()
        json.loads(path.read_text())
    for stage in (bundle.autoencoder, family):
        assert (out / f"loss-{stage}.csv").exists()
        assert "<polyline" in (out / f"loss-{stage}.svg").read_text()
    assert sum(path.stat().st_size for path in out.rglob("*")) < 16e6
    state = train(family, work / "warm", init=out, steps=1)
    for name in bundle.parts:
        for key, value in getattr(bundle, name).state_dict().items():
            assert torch.allclose(state["module"][f"{name}.{key}"], value, atol=1e-2)


def test_the_padding_of_t5_is_exactly_zero():
    tokenizer = models.build_t5_tokenizer()
    encoder = models.build_t5(tokenizer)
    short = models.t5_ids(tokenizer, [CAPTION, ""])
    count = int((short[0] != tokenizer.pad_token_id).sum())
    assert (short[1] != tokenizer.pad_token_id).sum() == 1
    settings = {"padding": "max_length", "max_length": 512, "return_tensors": "pt"}
    long = tokenizer([CAPTION, ""], **settings).input_ids
    out, wanted = encoder(short).last_hidden_state, encoder(long).last_hidden_state
    assert not wanted[0, count:].any() and not wanted[1, 1:].any()
    assert not out[0, count:].any() and wanted[0, :count].abs().min(1).values.all()
    torch.testing.assert_close(out[:, : models.T5_CAPTION], wanted[:, : models.T5_CAPTION])
    swapped = models.t5_ids(tokenizer, [CAPTION.replace("circle", "ring")])
    changed = (encoder(swapped).last_hidden_state - out[:1]).abs().amax(-1)[0] > 0
    assert changed[:4].all() and not changed[4:].any()  # a token sees itself and what follows


def test_training_leaves_the_padding_of_t5_alone(work):
    state = train("flux", work)["module"]
    fresh = FAMILIES["flux"]().state_dict()
    prefix = "text_encoder_2.encoder."
    bias = prefix + "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    hidden = fresh[bias] == -1e4
    assert hidden.any() and torch.equal(hidden, state[bias] == -1e4)
    words = state[prefix + "embed_tokens.weight"]
    assert not words[0].any() and words[1].any()
    assert torch.equal(words, state["text_encoder_2.shared.weight"])


def test_the_t5_tokenizer_knows_every_word_of_the_world(tmp_path):
    tokenizer = models.build_t5_tokenizer()
    rng = np.random.default_rng(1)
    for _ in range(200):
        caption = world.caption(world.sample_scene(rng, 4), rng)
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.replace(",", " ,").split()) + 1 <= models.T5_CAPTION
        assert len(tokenizer(caption.capitalize()).input_ids) == len(ids)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again("Zebra, 3").input_ids == tokenizer("Zebra, 3").input_ids
    assert tokenizer.unk_token_id not in tokenizer("Zebra, 3").input_ids


def test_capitals_mean_the_same():
    tokenizer = models.build_t5_tokenizer()
    encoder = models.build_t5(tokenizer)
    models.share_capitals(encoder, tokenizer)
    low, high = (encoder(models.t5_ids(tokenizer, [t]))[0] for t in (CAPTION, CAPTION.title()))
    assert torch.equal(low, high)


def test_another_autoencoder_is_refused(work):
    config = work / "autoencoder" / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0', '"scaling_factor": 1'))
    with pytest.raises(ValueError, match="different autoencoders; use another --work"):
        train_denoiser.provide_autoencoder(work, Path(dittune.checkpoint("shapes-sd3")))


def test_the_tokenizer_of_clips_knows_every_word_of_theirs():
    tokenizer = models_wan.build_tokenizer()
    rng = np.random.default_rng(1)
    for _ in range(200):
        caption = motion.caption(motion.sample_clip(rng, 2), rng)
        count = len(caption.replace(",", " ,").split()) + 1
        assert len(tokenizer(caption).input_ids) == count <= models_wan.CAPTION_TOKENS


def test_the_labels_of_a_clip_are_those_of_its_frames():
    clip = motion.sample_clip(np.random.default_rng(0), 2)
    labels = clip_data.token_labels(clip).reshape(3, 64, -1)
    assert np.array_equal(labels[0], train_denoiser.data.token_labels(clip.scene(0)))
    frames = [train_denoiser.data.token_labels(clip.scene(i)) for i in range(5, 9)]
    np.testing.assert_allclose(labels[2], np.mean(frames, 0), atol=1e-6)


def test_the_video_autoencoder_trains_resumes_and_measures_its_latents(tmp_path):
    train_video_autoencoder.train(tmp_path, steps=1, batch=2)
    train_video_autoencoder.train(tmp_path, steps=2, batch=2)
    vae = AutoencoderKLWan.from_pretrained(tmp_path / "vae")
    assert min(vae.config.latents_std) > 0 and any(vae.config.latents_mean)
    for half in (vae.encoder, vae.decoder):  # what is learned on crops holds for whole frames
        assert not half.mid_block.attentions[0].proj.weight.any()
    x = clip_data.crops(2, np.random.default_rng(0))
    assert x.shape == (2, 3, 9, 32, 32) and x.min() >= -1 and x.max() <= 1
    latents = vae.encode(x).latent_dist.mode()
    assert latents.shape == (2, 24, 3, 4, 4)
    assert vae.decode(latents).sample.shape == x.shape


def test_the_video_decoder_trains_alone(tmp_path):
    with pytest.raises(FileNotFoundError, match="train video_autoencoder first"):
        train_video_autoencoder.train_decoder(tmp_path / "video_decoder", steps=1)
    folder = tmp_path / "video_autoencoder" / "vae"
    torch.manual_seed(0)
    models_wan.build_autoencoder().save_pretrained(folder)
    before = AutoencoderKLWan.from_pretrained(folder)
    train_video_autoencoder.train_decoder(tmp_path / "video_decoder", steps=2, batch=2)
    after = AutoencoderKLWan.from_pretrained(folder)
    changed = {
        name.split(".")[0]
        for name, value in after.state_dict().items()
        if not torch.equal(value, before.state_dict()[name])
    }
    assert changed == {"decoder", "post_quant_conv"} and after.config == before.config


def test_an_autoencoder_that_is_nowhere_is_to_be_trained_first(tmp_path, monkeypatch):
    monkeypatch.setattr(train_denoiser, "available_checkpoints", lambda: ["shapes-sd3"])
    with pytest.raises(ValueError, match="train video_autoencoder first"):
        train_denoiser.provide_autoencoder(tmp_path, None, "video_autoencoder")


def test_training_on_clips_begins_with_an_ear_for_words(monkeypatch):
    """Cross attention of the new model, and of one whose padding is as loud as its words."""
    shares = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **options):
        if attn_mask is not None and attn_mask.shape[-1] == models_wan.CAPTION_TOKENS + 1:
            logits = query @ key.mT * query.shape[-1] ** -0.5 + attn_mask
            shares.append(float(logits.softmax(-1)[..., -1].mean()))
        return plain(query, key, value, attn_mask=attn_mask, **options)

    text = "a red circle moving right and a still blue star"

    def padding_share(quieten):
        monkeypatch.setattr(bundle_wan, "quieten_padding", quieten)
        torch.manual_seed(4)
        bundle = FAMILIES["wan"]()
        generator = torch.Generator().manual_seed(0)
        noisy = torch.randn(2, models_wan.LATENT_CHANNELS, 3, 8, 8, generator=generator)
        words = models_wan.text_inputs(bundle.tokenizer, [text] * 2)
        shares.clear()
        with torch.no_grad():
            bundle(noisy, torch.full((2,), 0.5), *words, bundle_wan.padding_bias(512))
        return max(shares)

    quieten = bundle_wan.quieten_padding
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    assert padding_share(lambda transformer: None) > 0.9
    assert padding_share(quieten) < 0.7
