"""Every command and every block of Python in README.md and docs/ is run.

A page is run from top to bottom in an empty folder. What would take minutes or a download is made
small, and only that: numbers of prompts, steps, rounds and images (`SMALL`), hub ids, which become
folders of the same classes with random weights (`STAND_INS`), and what those small models or a
machine without a GPU cannot have (`IN_PYTHON`). Blocks marked `py` need packages that are not
installed for tests; they are compiled only.
"""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import dittune
from dittune.pipelines import cli
from dittune.pipelines.settings import described
from tests import tiny, tiny_video

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LONG_PAGES = [ROOT / "docs" / "methods" / "softpag.md"]  # 20 random sets, and a search
OTHER_TOOLS = {"mkdocs", "mypy", "python", "python3", "pip", "pytest", "ruff", "torchrun"}
SMALL = {
    "generate": {"--steps": "2", "--num-images": "2"},
    "eval": {"--steps": "1", "--limit": "2", "--seeds": "1"},
    "headhunt": {"--steps": "1", "--limit": "1", "--rounds": "1", "--per-round": "1"},
    "story": {"--steps": "1"},
    "story-eval": {"--steps": "1", "--each": "1", "--subjects": "2"},
    "video": {"--steps": "1", "--frames": "5", "--size": "32"},
    "bench": {"--rounds": "3", "--limit": "2"},
}
PAGE = "dittune.pipelines.demo.page"  # it would serve for ever; tests/browser has the real one
ADDED = {
    "generate": ["--steps"],
    "eval": ["--steps", "--limit"],
    "headhunt": ["--steps", "--limit"],
    "story": ["--steps"],
    "story-eval": ["--steps"],
}


STAND_INS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": tiny_video.wan,
    "stabilityai/stable-diffusion-3.5-medium": tiny.sd35,
    "stabilityai/stable-diffusion-xl-base-1.0": tiny.sdxl,
    "black-forest-labs/FLUX.1-dev": tiny.flux,
}
IN_PYTHON = {
    r"height=480, width=832, num_frames=81": "height=32, width=32, num_frames=5",
    r"num_inference_steps=\d+": "num_inference_steps=2",
    r"\[48:\]": "[48:58]",
    r"dtype=torch.bfloat16": "dtype=torch.float32",
    r"enable_model_cpu_offload\(\)": 'enable_model_cpu_offload(device="cpu")',
    r"compile\(fullgraph=True\)": 'compile(fullgraph=True, backend="eager")',
    r'heads="11:3,12:\*"': 'heads="1:1,2:*"',
    r"a corgi in a red scarf": "a red circle",
}


def text_of(page):
    """A page with the parts of other files it shows."""

    def shown(match):
        name, _, section = match[1].partition(":")
        text = (ROOT / name).read_text()
        if section:
            start, end = (f"<!-- --8<-- [{side}:{section}] -->" for side in ("start", "end"))
            text = text.split(start)[1].split(end)[0]
        return text

    return re.sub(r'^--8<-- "(.+)"$', shown, page.read_text(), flags=re.MULTILINE)


def blocks(page, language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def commands(page):
    """The arguments of each `dittune` of a page, also in a chain or under `accelerate launch`."""
    for block in blocks(page, ""):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if "dittune.pipelines.cli" in words:
                    words = ["dittune", *words[words.index("dittune.pipelines.cli") + 1 :]]
                if words and words[0] == "dittune":
                    yield words[1:]
                else:
                    assert not words or words[0] in {*OTHER_TOOLS, "."}, f"nothing runs {line!r}"


def small(arguments):
    """The same command with fewer prompts, steps, rounds and images."""
    values = SMALL.get(arguments[0], {})
    made = list(arguments)
    for i, word in enumerate(arguments[:-1]):
        made[i + 1] = values.get(word, made[i + 1])
    if "--from" not in made:  # a repetition has the steps of the picture
        for option in ADDED.get(arguments[0], ()):
            made += [option, values[option]] if option not in made else []
    return made


def titled(page):
    return page.relative_to(ROOT).as_posix()


def with_commands(wanted):
    """Pages with (or without) benchmarks among their commands; a search takes long as well."""
    pages = [p for p in PAGES if any((c[0] == "bench") == wanted for c in commands(p))]
    return [pytest.param(p, marks=pytest.mark.slow if p in LONG_PAGES else ()) for p in pages]


def run_commands(page, are_benchmarks, folder, hub, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, PAGE, SimpleNamespace(serve=lambda *settings: None))
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    (folder / "circles.txt").write_text("a red circle\na blue circle\n")
    (folder / "same.txt").write_text("a red circle and a blue square\n")
    (folder / "scenes.txt").write_text("a red circle and a blue square\n")
    for block in blocks(page, "yaml"):
        (folder / block.split()[1]).write_text(block)  # its first line is `# name`
    for arguments in commands(page):
        if (arguments[0] == "bench") == are_benchmarks:
            with pytest.raises(SystemExit) as stop:
                cli.main([str(hub / w) if w in STAND_INS else w for w in small(arguments)])
            assert stop.value.code == 0, arguments


@pytest.mark.parametrize("page", with_commands(False), ids=titled)
def test_commands_run(page, tmp_path, hub, monkeypatch):
    run_commands(page, False, tmp_path, hub, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", with_commands(True), ids=titled)
def test_benchmarks_run(page, tmp_path, hub, monkeypatch):
    run_commands(page, True, tmp_path, hub, monkeypatch)


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """Where the stand-in of each hub id is."""
    folder = tmp_path_factory.mktemp("hub")
    for name, build in STAND_INS.items():
        build().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=titled)
def test_python_runs(page, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"modular_pipe": SimpleNamespace(update_components=lambda guider: None)}
    for code in blocks(page, "python"):
        if "torchao" in code:
            continue  # tests/pipelines/test_checkpoints.py does, where torchao is installed
        for pattern, replacement in IN_PYTHON.items():
            code = re.sub(pattern, replacement, code)
        for name in STAND_INS:
            code = code.replace(f'"{name}"', repr(str(hub / name)))
        exec(compile(code, titled(page), "exec"), names)


def test_other_python_is_python():
    found = [(page, code) for page in PAGES for code in blocks(page, "py")]
    assert found
    for page, code in found:
        compile(code, titled(page), "exec")


def test_each_method_has_a_page_with_all_its_settings():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    for name in dittune.available_methods():
        page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
        assert f"<!-- settings: {name} -->" in page
        table = hooks.on_page_markdown(page)
        assert all(f"| `{field}` |" in table for field in dittune.load_method(name)().__dict__)
    assert described(dittune.Method).keys() == {"start", "stop"}


@pytest.mark.parametrize("name", dittune.available_methods())
def test_each_method_is_listed(name):
    assert f"methods/{name}.md" in (ROOT / "mkdocs.yml").read_text()
    assert f"| `{name}` |" in (ROOT / "README.md").read_text()


def test_public_names_are_in_the_reference():
    text = (ROOT / "docs" / "api.md").read_text()
    documented = {line.rpartition(".")[2] for line in text.splitlines() if line.startswith(":::")}
    assert "errors" in documented  # as a module
    assert set(dittune.__all__) - documented == {"__version__", "DittuneError"}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=titled)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing
