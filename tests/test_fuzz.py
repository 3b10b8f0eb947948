"""Whatever a user types is understood or refused in one line; no traceback.

The fast suite tries some hundred inputs. Ten thousand: `pytest -m slow tests/test_fuzz.py`.
"""

import contextlib
import io

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dittune
from dittune import config
from dittune.errors import DittuneError
from dittune.heads import parse_layers
from dittune.pipelines import cli
from dittune.pipelines.arguments import check_numbers, image_size
from dittune.pipelines.headhunt.objectives import load_objective
from dittune.pipelines.loading import fingerprint, pick_device, pick_dtype
from dittune.pipelines.pipeline import Pipeline
from dittune.samples.shapes import models
from dittune.words.tokens import find_concepts, parse_concepts, prompt_words

EXAMPLES = pytest.mark.parametrize(
    "examples", [40, pytest.param(1250, marks=pytest.mark.slow)], ids=["some", "many"]
)

# Pieces of what is understood, wrong digits, huge numbers, and bytes that are no text.
PIECES = [
    *"0123456789:,;*x#+@=.-_ ~/",
    *("²", "٣", "softpag", "none", "u", "heads", "red", "circle", "nan", "inf", "1e999"),
    *("9" * 5000, "\x00", "\udcff", "${", "???", "true", "null"),
]
WORDS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    st.text(max_size=20),
    st.text(st.characters(), max_size=8),  # surrogates too, which stand for bytes that are no text
)
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), WORDS, st.binary(max_size=4),
        st.dates(),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(WORDS, st.integers(), st.none()), inner, max_size=3),
    ),
    max_leaves=6,
)  # fmt: skip
METHODS = {name: list(dittune.load_method(name)().__dict__) for name in dittune.available_methods()}


@st.composite
def contents(draw):
    """A configuration of which single values are anything."""
    found = draw(st.dictionaries(st.sampled_from([*vars(config.RunConfig())]), VALUES, max_size=3))
    if draw(st.booleans()):
        name = draw(st.sampled_from(list(METHODS)))
        fields = st.sampled_from(METHODS[name])
        found["methods"] = {name: draw(st.dictionaries(fields, VALUES, max_size=3))}
    return found


def fuzz(examples, *strategies):
    """A decorator that runs a check on so many draws."""

    def run(check):
        quick = settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        quick(given(*strategies)(check))()

    return run


def refused_or_not(function, *arguments):
    """What it returns, or None if it was refused; any other error is a failure."""
    try:
        return function(*arguments)
    except DittuneError as error:
        assert str(error).strip()
        return None


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
        (fingerprint, "~nobody-of-this-name"),
        (fingerprint, LONG),
        (load_objective, ".relative:f"),
    ],
)
def test_what_once_had_a_traceback(function, argument):
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


def run(arguments):
    """Run the command line without a model: (exit code, standard output, standard error)."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # as strict as a terminal
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        out.flush(), err.flush()
    return stop.value.code, *(f.buffer.getvalue().decode("utf-8") for f in (out, err))


def one_line_or_success(arguments):
    code, _, err = run(arguments)
    assert code in (0, 2), err
    if code == 2:
        (line,) = [line for line in err.splitlines() if line.strip()]
        assert line.startswith("error: "), line


OPTIONS = {
    "generate": ["--method", "--set", "--size", "--seed", "--steps", "--guidance-scale", "--model",
                 "--num-images", "--negative-prompt", "--config", "--device", "--dtype", "--from",
                 "--prompts-file"],
    "eval": ["--method", "--set", "--sweep", "--prompts", "--objects", "--limit", "--seeds",
             "--objective", "--guidance-scale", "--config"],
    "headhunt": ["--set", "--prompts", "--objective", "--rounds", "--per-round", "--limit"],
    "config show": ["--model", "--method", "--set"],
}  # fmt: skip
LIKELY = st.one_of(
    WORDS,
    st.sampled_from(
        ["softpag", "none", "none@4", "pag=softpag", "softpag@", "conform", "val", "2"]
    ),
    st.builds("softpag.{}={}".format, st.sampled_from(METHODS["softpag"]), WORDS),
    st.builds("conform.{}={}".format, st.sampled_from(METHODS["conform"]), WORDS),
    st.integers().map(str),
    st.floats().map(str),
)


@pytest.fixture
def no_model(monkeypatch, tmp_path):
    """Everything but the model itself."""

    def refuse(*_, **__):
        raise DittuneError("no model in this test")

    monkeypatch.setattr(Pipeline, "from_pretrained", refuse)
    monkeypatch.chdir(tmp_path)


@EXAMPLES
@pytest.mark.parametrize("command", OPTIONS)
@pytest.mark.usefixtures("no_model")
def test_command_lines(command, examples):
    pairs = st.tuples(st.sampled_from(OPTIONS[command]), LIKELY)
    first = st.lists(WORDS, max_size=1) if command == "generate" else st.just([])

    @fuzz(examples, first, st.lists(pairs, max_size=4), st.booleans())
    def check(prompt, options, dry_run):
        arguments = [*command.split(), *prompt, *(word for pair in options for word in pair)]
        if command == "generate" and dry_run:
            arguments.append("--dry-run")
        one_line_or_success([word.replace("\x00", "") for word in arguments])  # no shell passes it
