"""Whatever a user writes is understood or refused in one line; no traceback. Texts and files.

The fast suite tries some hundred inputs. Ten thousand: `pytest -m slow -k fuzz`.
"""

import io
import json

import pytest
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image

import dittune
from dittune import config
from dittune.errors import DittuneError
from dittune.heads import parse_layers
from dittune.pipelines import story_eval
from dittune.pipelines.arguments import check_numbers, image_size
from dittune.pipelines.cli_options import parse_counts
from dittune.pipelines.demo.uploads import keep_masks
from dittune.pipelines.generate import recorded
from dittune.pipelines.headhunt.objectives import load_objective
from dittune.pipelines.loading import fingerprint, pick_device, pick_dtype
from dittune.pipelines.media import RECORD_KEY, PngImagePlugin
from dittune.pipelines.region_prompts import joined, naming
from dittune.pipelines.segment import load_segmenter
from dittune.pipelines.story import named_in
from dittune.samples.shapes import models
from dittune.subjects.masks import mask_file, read_masks
from dittune.words.tokens import find_concepts, parse_concepts, prompt_words
from tests.fuzzing import (
    BOXES,
    EXAMPLES,
    VALUES,
    WORDS,
    contents,
    fuzz,
    one_line_or_success,
    refused_or_not,
    run,
)


def stories(split):
    return [*story_eval.stories(split, 1)]


LONG = "9" * 5000  # more digits than Python converts
YAML = ["a: 2001-13-45", "a: !!int x", "a: !!bool 3", "a: !!timestamp x", f"seed: {LONG}",
        "model: " + "[" * 2000, "!!map [1]", "methods: ???", "prompts: ???", "steps: ???",
        "methods: {softpag: {u: ???}}", "methods: {softpag: {u: '${x}'}}", "steps: '${'",
        "prompts: '${'", 'prompts: ["\\uDCFF"]']  # fmt: skip


@pytest.mark.parametrize("text", YAML, ids=lambda text: text[:20])
def test_files_that_once_had_a_traceback(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(DittuneError):
        config.resolve(config.read_yaml(path))


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (dittune.HeadSet, LONG + ":1"),
        (parse_layers, LONG),
        (parse_layers, "0-99999999999"),
        (image_size, config.RunConfig(size=LONG)),
        (check_numbers, config.RunConfig(guidance_scale=float("nan"))),
        (check_numbers, config.RunConfig(steps=0)),
        (check_numbers, config.RunConfig(num_images=10**12)),
        (stories, "tset"),
        (fingerprint, "~nobody-of-this-name"),
        (fingerprint, "~\0"),
        (fingerprint, LONG),
        (load_objective, ".relative:f"),
        (load_segmenter, ".relative:f"),
    ],
)
def test_what_once_had_a_traceback_or_no_end(function, argument):
    with pytest.raises(DittuneError):
        function(argument)


def test_a_long_name_is_a_model_without_a_preset():
    assert config.resolve({"model": "x" * 300}).steps is None


def test_prompts_that_are_no_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xff\xfe red")
    for arguments in (
        ["generate", "--prompts-file"],
        ["eval", "--prompts"],
        ["headhunt", "--prompts"],
    ):
        code, _, err = run([*arguments, str(path)])
        assert code == 2 and err.startswith("error: cannot read prompts")
    code, _, err = run(["generate", "\udcff", "--dry-run"])
    assert code == 2 and "UTF-8" in err


@EXAMPLES
def test_head_sets(examples):
    @fuzz(examples, WORDS)
    def check(text):
        heads = refused_or_not(dittune.HeadSet, text)
        if heads is not None:
            assert str(dittune.HeadSet(str(heads))) == str(heads)


@EXAMPLES
def test_layers_and_sizes(examples):
    @fuzz(examples, WORDS)
    def check(text):
        refused_or_not(parse_layers, text)
        refused_or_not(image_size, config.RunConfig(size=text))
        refused_or_not(pick_device, text)
        refused_or_not(pick_dtype, text, "cpu")
        refused_or_not(fingerprint, text)


@EXAMPLES
def test_concepts_and_prompts(examples):
    tokenizer = models.build_tokenizer()
    axes = [dittune.call.TextAxis(tokenizer, "prompt", 0, 32)]

    @fuzz(examples, WORDS, WORDS)
    def check(concepts, prompt):
        prompt = prompt.encode("utf-8", "ignore").decode()  # a tokenizer takes text only
        asked = refused_or_not(parse_concepts, concepts) or ()
        for words in (asked, find_concepts(prompt)):
            refused_or_not(prompt_words, axes, {"prompt": prompt}, words)


@EXAMPLES
def test_resolved_configurations(examples):
    @fuzz(examples, contents(), st.lists(WORDS, max_size=2), st.lists(WORDS, max_size=2))
    def check(content, methods, overrides):
        refused_or_not(config.resolve, content, methods, overrides)
        resolved = refused_or_not(config.resolve, content)
        if resolved is not None:
            config.build_methods(resolved)
            refused_or_not(check_numbers, resolved)


@EXAMPLES
def test_files(examples, tmp_path):
    path = tmp_path / "run.yaml"

    @fuzz(examples, st.one_of(st.binary(max_size=60), contents(), VALUES, WORDS))
    def check(content):
        if isinstance(content, str):
            content = content.encode(
                "utf-8", "surrogateescape" if "\udcff" in content else "ignore"
            )
        if not isinstance(content, bytes):
            content = yaml.dump(content, allow_unicode=True).encode("utf-8", "ignore")
        path.write_bytes(content)
        read = refused_or_not(config.read_yaml, path)
        if read is not None:
            resolved = refused_or_not(config.resolve, read)
            if resolved is not None:
                path.write_text(config.write_yaml(resolved), encoding="utf-8")
                again = config.resolve(config.read_yaml(path))
                assert config.write_yaml(again) == config.write_yaml(resolved)


@EXAMPLES
def test_boxes_and_what_else_is_short(examples):
    @fuzz(examples, st.lists(BOXES, min_size=1, max_size=3), st.lists(WORDS, max_size=2))
    def check(boxes, prompts):
        made = refused_or_not(joined, boxes)
        if made is not None:
            assert len(naming(prompts, boxes)) == max(1, len(prompts))
            refused_or_not(lambda: dittune.Regions(regions=made))
        for text in (*boxes, *prompts):
            refused_or_not(parse_counts, text)
            refused_or_not(load_segmenter, text)
            named_in(text, [p for p in prompts if p.strip()])


SUBJECTS = ("red circle", "blue square")
NAMED = [[True, False], [False, True], [True, True]]


@EXAMPLES
def test_boxes_of_subjects(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    @fuzz(examples, st.lists(BOXES, max_size=8).map("; ".join))
    def check(text):
        masks = refused_or_not(read_masks, text, SUBJECTS, NAMED, (4, 6))
        assert masks is None or [one.any((1, 2)).tolist() for one in masks] == NAMED


@st.composite
def pictures(draw):
    """The bytes of a file that should be a mask."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=40))
    mode = draw(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "F", "CMYK"]))
    side = st.sampled_from([1, 2, 4, 6, 7, 60])
    image = Image.new(mode, (draw(side), draw(side)), draw(st.sampled_from([0, 1])))
    if draw(st.booleans()):
        image.paste(Image.new(mode, (1, 2), 1))
    file = io.BytesIO()
    image.save(file, "TIFF" if mode in ("F", "CMYK") else "PNG")
    content = bytearray(file.getvalue())
    for _ in range(draw(st.integers(0, 2))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.sampled_from([len(content), len(content) // 2]))])


@EXAMPLES
def test_pictures_of_masks(examples, tmp_path):
    @fuzz(examples, st.lists(pictures(), min_size=4, max_size=4))
    def check(files):
        kept = tmp_path / "kept"
        places = ((0, 0), (1, 1), (2, 0), (2, 1))
        paths = [tmp_path / mask_file(*place) for place in places]
        for path, content in zip(paths, files):
            path.write_bytes(content)
        masks = refused_or_not(read_masks, str(tmp_path), SUBJECTS, NAMED, (4, 6))
        assert masks is None or all(one.dtype == torch.bool for one in masks)
        kept.mkdir(exist_ok=True)
        refused_or_not(keep_masks, [str(path) for path in paths], kept)


RECORDS = st.one_of(
    VALUES, contents(), st.builds(lambda c, v: {"config": c, "versions": v}, contents(), VALUES)
)


@EXAMPLES
def test_records(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, image = tmp_path / "0.png", Image.new("RGB", (2, 2))

    @fuzz(examples, RECORDS, st.binary(max_size=20))
    def check(record, other):
        text = json.dumps(record, default=str, skipkeys=True)
        info = PngImagePlugin.PngInfo()
        info.add_itxt(RECORD_KEY, text)
        image.save(path, pnginfo=info)
        refused_or_not(recorded, path)
        one_line_or_success(["generate", "--from", str(path), "--dry-run"])
        for name in ("other.png", "other.mp4"):
            (tmp_path / name).write_bytes(other)
            refused_or_not(recorded, tmp_path / name)
