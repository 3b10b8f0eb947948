"""What the fuzz tests share: what users may type, and how many times it is tried."""

import contextlib
import io

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dittune
from dittune import config
from dittune.errors import DittuneError
from dittune.pipelines import cli


def examples(some, many):
    """How many inputs a test tries, in the fast suite and in the slow one."""
    slow = pytest.param(many, marks=pytest.mark.slow)
    return pytest.mark.parametrize("examples", [some, slow], ids=["some", "many"])


EXAMPLES = examples(40, 1250)

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
NUMBERS = st.sampled_from(["0", "0.5", "1", "-1", "nan", "1e999", "", "²", "9" * 5000])
LABELS = st.one_of(
    st.sampled_from(["red circle", "blue square", "blue square @2", "@", "a@²"]), WORDS
)
BOXES = st.one_of(
    st.builds("{},{},{},{}: {}".format, NUMBERS, NUMBERS, NUMBERS, NUMBERS, LABELS),
    st.builds("0,0,0.5,1: {}".format, LABELS),
    st.builds("0.5,0,1,1: {}".format, LABELS),
    WORDS,
)
METHODS = {name: list(dittune.load_method(name)().__dict__) for name in dittune.available_methods()}


@st.composite
def contents(draw):
    """A configuration of which single values are anything."""
    found = draw(st.dictionaries(st.sampled_from([*vars(config.RunConfig())]), VALUES, max_size=3))
    if draw(st.booleans()):
        found["model"] = draw(st.sampled_from([*config.preset_files()]))
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
            derandomize=examples < 100,  # the fast suite tries the same ones each time
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
        said = [line for line in err.splitlines() if line.strip()]  # warnings and progress first
        assert [line for line in said if line.startswith("error: ")] == said[-1:], err
