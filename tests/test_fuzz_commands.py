"""Whatever is typed after `dittune` is run or refused in one line: all commands and all options.

Once without a model, and once with tiny ones and settings of methods that are nearly right.
"""

import sys
import tempfile
from types import SimpleNamespace

import pytest
import typer
from hypothesis import strategies as st

import dittune
from dittune.errors import DittuneError
from dittune.pipelines import bench, bench_memory, cli
from dittune.pipelines.attention_bench import bench as attention_bench
from dittune.pipelines.attention_bench import model_bench
from dittune.pipelines.pipeline import Pipeline
from dittune.pipelines.settings import settings_of
from tests import tiny, tiny_video
from tests.fuzzing import BOXES, METHODS, WORDS, examples, fuzz, one_line_or_success


def commands(group, path=()):
    """Every command with its parameters, as Typer knows them."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command.params


COMMANDS = dict(commands(typer.main.get_command(cli.app)))
FILES = {"prompts.txt": "a red circle\n", "run.yaml": "prompts: [red]", "heads.yaml": "{}"}
LIKELY = st.one_of(
    WORDS,
    st.sampled_from(
        ["softpag", "none", "none@4", "pag=softpag", "softpag@", "conform", "val", "2", *FILES]
    ),
    st.builds("softpag.{}={}".format, st.sampled_from(METHODS["softpag"]), WORDS),
    st.builds("conform.{}={}".format, st.sampled_from(METHODS["conform"]), WORDS),
    st.integers().map(str),
    st.floats().map(str),
    BOXES,
)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A folder with some files."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)


@pytest.fixture
def no_model(monkeypatch, here):
    """Everything but what uses a model."""

    def refuse(*_, **__):
        raise DittuneError("no model in this test")

    monkeypatch.setattr(Pipeline, "from_pretrained", refuse)
    monkeypatch.setattr(bench, "bench_attach", refuse)
    monkeypatch.setattr(bench_memory, "bench_memory", refuse)
    monkeypatch.setattr(attention_bench, "bench_attention", refuse)
    monkeypatch.setattr(model_bench, "bench_model", refuse)
    page = SimpleNamespace(serve=refuse)
    monkeypatch.setitem(sys.modules, "dittune.pipelines.demo.page", page)


def option(parameter):
    """What may be typed for one parameter, as words."""
    if parameter.param_type_name == "argument":
        return st.tuples(LIKELY)
    name = st.sampled_from([*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag:
        return st.tuples(name)
    if parameter.name == "out":  # nowhere but below this folder
        return st.tuples(name, LIKELY.map(lambda text: text.replace("/", "").replace("..", "")))
    return st.tuples(name, LIKELY)


@examples(10, 400)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("no_model")
def test_command_lines(command, examples):
    options = st.one_of(*map(option, COMMANDS[command])) if COMMANDS[command] else st.just(())

    @fuzz(examples, st.lists(options, max_size=5))
    def check(given):
        words = [*command.split(), *(word for words in given for word in words)]
        one_line_or_success([word.replace("\x00", "") for word in words])  # no shell passes it


NUMBERS = {
    "int": ["-1", "0", "1", "2", "3", "7", "4096"],
    "float": ["0", "0.3", "0.5", "1", "1", "0.9", "2", "-1", "1e9", "nan", "inf"],
    "bool": ["true", "false"],
}
TEXTS = st.sampled_from([
    "", "0", "1-2", "9", "0:1", "1:*, 0:0", "0:9", "red", "red+circle, blue", "circle#2", "dog",
    "red:2", "red:-1, circle:0", "red:nan", "red circle", "0,0,0.5,1: red", "0,0,1,1: red circle",
    "0,0,0.5,1: red; 0.5,0,1,1: blue", "1x2x2", "0x1x1", "1x1x1, 9x9x9", "here", "prompts.txt",
])  # fmt: skip
FAMILIES = {"sd3": tiny.sd3, "sd": tiny.sd, "flux": tiny.flux, "wan": tiny_video.wan}
PICTURES = ["generate", "story"]
SETTINGS = {name: settings_of(dittune.load_method(name)) for name in METHODS}


@st.composite
def method_settings(draw):
    """A method and some settings, each of the right type, or nearly."""
    name = draw(st.sampled_from([*SETTINGS]))
    words = ["--method", name]
    for setting in draw(st.lists(st.sampled_from(SETTINGS[name]), max_size=4)):
        likely = st.sampled_from(setting.choices) if setting.choices else TEXTS
        for kind, values in NUMBERS.items():
            if setting.type.startswith(kind):
                likely = st.sampled_from(values)
        words += ["--set", f"{name}.{setting.name}={draw(likely)}"]
        if draw(st.integers(0, 9)) == 0:
            words[-1] = f"{name}.{setting.name}={draw(WORDS)}"
    return words


CALL = {
    "--size": st.sampled_from(["32", "16x64", "8", "17", "0", "32x", "048"]),
    "--steps": st.sampled_from(["1", "2", "3"]),
    "--guidance-scale": st.sampled_from(["1", "0", "-2", "4", "1e30"]),
    "--negative-prompt": WORDS,
    "--region": BOXES,
    "--maps-of": TEXTS,
}
PROMPTS = st.sampled_from(
    ["a red circle", "a red circle and a blue square", "of", "red " * 90, "²", "red\n#1 ${", " "]
)


@examples(6, 200)
@pytest.mark.parametrize(
    ("command", "family"),
    [(command, family) for family in FAMILIES if family != "wan" for command in PICTURES]
    + [("video", "wan")],
)
@pytest.mark.usefixtures("here")
def test_with_a_model(command, family, examples, monkeypatch):
    pipe = FAMILIES[family]()

    def tiny_one(name, methods=(), **_):
        return Pipeline(pipe, methods, name)

    monkeypatch.setattr(Pipeline, "from_pretrained", tiny_one)

    known = {name for parameter in COMMANDS[command] for name in parameter.opts}
    calls = [st.tuples(st.just(name), CALL[name]) for name in CALL if name in known]

    @fuzz(examples, PROMPTS, method_settings(), st.lists(st.one_of(calls), max_size=2))
    def check(prompt, method, call):
        words = ["--steps", "1", "--size", "32", "--model", "tiny/tiny", "--seed", "1", *method]
        words += [word for words in call for word in words]
        if command == "story":
            words += ["--subject", prompt, "--subject", "a ring", "--scenes", "prompts.txt"]
        else:
            words += [prompt, *(["--frames", "5"] if command == "video" else [])]
        with tempfile.TemporaryDirectory() as out:
            one_line_or_success([w.replace("\x00", "") for w in [command, "--out", out, *words]])
