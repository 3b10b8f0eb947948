"""Marks are drawn and read; plain scenes stay what they were."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

import dittune
from dittune.samples.shapes import data, marks, score_marks, train, train_autoencoder, world


def share_read_right(count, seed, through=lambda picture: picture):
    """Share of scenes read right in everything, and of objects whose mark is."""
    rng = np.random.default_rng(seed)
    scenes = objects = right = 0
    for _ in range(count):
        scene = world.sample_scene(rng)
        own = marks.sample_marks(rng, len(scene.objects))
        background, found = score_marks.segment(through(marks.draw(scene, own)))
        kinds = sorted((f.color, f.shape, f.size, f.mark) for f in found)
        wanted = [(t.color, t.shape, t.size, m) for t, m in zip(scene.objects, own, strict=True)]
        scenes += background == scene.background and kinds == sorted(wanted)
        objects += len(wanted)
        right += sum(
            (c, s, m) in {(f.color, f.shape, f.mark) for f in found} for c, s, _, m in wanted
        )
    return scenes / count, right / objects


def test_right_on_drawn_scenes():
    assert min(share_read_right(40, seed=21)) >= 0.995


@pytest.mark.slow
def test_right_on_3000_drawn_scenes():
    assert min(share_read_right(3000, seed=22)) >= 0.995


@pytest.mark.slow
def test_marks_survive_the_bundled_autoencoder():
    vae = AutoencoderKL.from_pretrained(f"{dittune.checkpoint('shapes-sd3-marked')}/vae")

    @torch.no_grad()
    def there_and_back(picture):
        x = data.to_unit(torch.from_numpy(picture).permute(2, 0, 1)[None])
        y = vae.decode(vae.encode(x).latent_dist.mean).sample[0].permute(1, 2, 0)
        return ((y.numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)

    assert share_read_right(500, 7, there_and_back)[1] >= 0.97


def test_plain_scenes_are_those_of_the_world():
    rng, draw = np.random.default_rng(5), np.random.default_rng(6)
    for _ in range(10):
        scene = world.sample_scene(rng)
        own = marks.sample_marks(draw, len(scene.objects), 0.0)
        assert set(own) == {"plain"}
        assert (marks.draw(scene, own) == world.draw(scene)).all()


def test_training_data_is_marked_only_where_asked(tmp_path):
    vae = Path(dittune.checkpoint("shapes-sd3")) / "vae"
    plain, marked = (data.SceneLatents(tmp_path, vae, 8, share) for share in (0.0, 1.0))
    assert plain.scenes == marked.scenes
    assert {mark for own in plain.marks for mark in own} == {"plain"}
    assert "plain" not in {mark for own in marked.marks for mark in own}
    assert not torch.equal(plain.latents, marked.latents)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_mark_is_no_fault_and_another_mark_is_told():
    thing = world.SceneObject("red", "circle", 30, 33, 10)
    seen = set()
    for mark in marks.MARKS:
        picture = marks.draw(world.Scene((thing,), "gray"), [mark])
        assert score_marks.score_marked(picture, "a red circle on a gray background").success
        assert not score_marks.score_marked(picture, "a red square").success
        (found,) = score_marks.segment(picture)[1]
        assert abs(found.x - 30) <= 1 and abs(found.y - 33) <= 1 and found.size == "medium"
        seen.add(found.mark)
    assert seen == set(marks.MARKS)


@pytest.mark.parametrize("wrong", [["deep"], ["deep", "striped"], ["dark"] * 3])
def test_wrong_marks_are_refused(wrong):
    things = (world.SceneObject("red", "circle", 20, 20, 8),
              world.SceneObject("blue", "ring", 45, 45, 8))  # fmt: skip
    with pytest.raises(ValueError, match="expected 2 marks of plain, deep"):
        marks.draw(world.Scene(things, "white"), wrong)


def test_pictures_lack_what_their_captions_name_only_where_asked(tmp_path):
    vae = Path(dittune.checkpoint("shapes-sd3")) / "vae"
    plain, loose, bare = (
        data.SceneLatents(tmp_path, vae, 40, missing=share) for share in (0.0, 0.5, 1.0)
    )
    assert plain.scenes == plain.captioned == loose.captioned == bare.captioned
    for kept, named in zip(loose.scenes, loose.captioned, strict=True):
        assert kept.objects and set(kept.objects) <= set(named.objects)
    counts = [sum(len(scene.objects) for scene in each.scenes) for each in (plain, loose, bare)]
    assert counts[0] > counts[1] > counts[2] == 40


def test_a_twin_has_the_kind_and_the_mark_and_a_place_of_its_own():
    rng, twins = np.random.default_rng(3), 0
    for _ in range(60):
        scene = world.sample_scene(rng)
        own = marks.sample_marks(rng, len(scene.objects))
        which = int(rng.integers(len(own)))
        both, marked = marks.with_twin(scene, own, which, rng)
        if both == scene:  # no room
            assert marked == own
            continue
        twins += 1
        twin = both.objects[-1]
        assert both.objects[:-1] == scene.objects and marked[:-1] == own
        first = scene.objects[which]
        assert (twin.color, twin.shape, marked[-1]) == (first.color, first.shape, own[which])
        found = score_marks.segment(marks.draw(both, marked))[1]
        assert len(found) == len(both.objects)
        assert {f.mark for f in found if f.color == twin.color} == {marked[-1]}
    assert twins > 40


def test_half_of_the_captions_name_the_twin(tmp_path):
    vae = Path(dittune.checkpoint("shapes-sd3")) / "vae"
    plain, twins = (data.SceneLatents(tmp_path, vae, 60, 0.8, twins=share) for share in (0.0, 0.5))
    named = [
        len(c.objects) - len(p.objects) for c, p in zip(twins.captioned, plain.scenes, strict=True)
    ]
    drawn = [
        len(t.objects) - len(p.objects) for t, p in zip(twins.scenes, plain.scenes, strict=True)
    ]
    assert 0 < sum(named) < 0.5 * sum(drawn)
    assert 0.2 < sum(drawn) / sum(len(p.objects) for p in plain.scenes) < 0.55
    assert all(n <= d for n, d in zip(named, drawn, strict=True))
    labels = twins.labels.float().sum((1, 2)) / 255
    assert torch.isfinite(labels).all() and twins.labels.shape == plain.labels.shape
    both = [i for i, more in enumerate(drawn) if more]
    assert not torch.equal(twins.latents[both], plain.latents[both])
    others = [i for i, more in enumerate(drawn) if not more]
    assert torch.equal(twins.latents[others], plain.latents[others])


def test_an_autoencoder_that_is_trained_on_keeps_its_scaling(tmp_path, monkeypatch):
    shares, drawn = [], data.scene_pictures

    def few(count, seed, marked):
        shares.append(marked)
        return drawn(4, seed, marked)

    monkeypatch.setattr(data, "scene_pictures", few)
    init = Path(dittune.checkpoint("shapes-sd3"))
    train_autoencoder.train(tmp_path, 1, init, marked=0.5, batch=2)
    before, after = (AutoencoderKL.from_pretrained(folder / "vae") for folder in (init, tmp_path))
    for name in ("scaling_factor", "shift_factor"):
        assert after.config[name] == before.config[name]
    assert shares == [0.5]
    changed = after.encoder.conv_in.weight - before.float().encoder.conv_in.weight
    assert 0 < changed.abs().max() < 0.01  # one small step from the given weights


def test_video_stages_take_no_marks(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "video_autoencoder", "--marked", "0.5"])
    with pytest.raises(SystemExit):
        train.main()
    assert "video_autoencoder takes no --init" in capsys.readouterr().err
