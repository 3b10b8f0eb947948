"""The page of `dittune demo`, its handlers called as gradio calls them; tests/browser clicks."""

import dataclasses
import gc
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import dittune
from dittune.config import resolve
from dittune.errors import ConfigError
from dittune.pipelines import cli
from dittune.pipelines.media import read_record
from dittune.pipelines.settings import settings_of
from tests import tiny, tiny_video
from tests.gradio_warnings import IGNORED

gr = pytest.importorskip("gradio")

from dittune.pipelines.demo import uploads, works  # noqa: E402
from dittune.pipelines.demo.attention_tab import AttentionTab  # noqa: E402
from dittune.pipelines.demo.controls import MethodPicker, defaults  # noqa: E402
from dittune.pipelines.demo.gallery_tab import GalleryTab  # noqa: E402
from dittune.pipelines.demo.generate_tab import GenerateTab  # noqa: E402
from dittune.pipelines.demo.page import build, launch  # noqa: E402
from dittune.pipelines.demo.parts import configuration  # noqa: E402
from dittune.pipelines.demo.preview import decode  # noqa: E402
from dittune.pipelines.demo.story_tab import StoryTab  # noqa: E402
from dittune.pipelines.demo.studio import CANCELLED, Cancelled, Studio, Watch  # noqa: E402
from dittune.pipelines.demo.video_tab import VideoTab  # noqa: E402

pytestmark = IGNORED
ME = SimpleNamespace(session_hash="me")
CALL = ("", 3, 2.0, "32")  # negative prompt, steps, guidance, size
PROMPT = "a red circle and a blue square"


@pytest.fixture(scope="module")
def studio(saved):
    yield Studio([str(saved)])
    gc.collect()


@pytest.fixture(scope="module")
def model(studio):
    return studio.models(videos=False)[0]


@pytest.fixture(scope="module")
def tabs(studio, model):
    with gr.Blocks():
        choice = gr.Dropdown([model], value=model)
        made = SimpleNamespace(
            generate=GenerateTab(studio, choice),
            attention=AttentionTab(studio, choice),
            story=StoryTab(studio, choice),
        )
        GalleryTab(studio, choice, made.generate, gr.Tabs())
    return made


def values(picker, **changed):
    """What the controls of a picker hold, some of them changed: `NAME=...` of any method."""
    return [changed.get(s.name, made.value) for (_, s), made in
            zip(picker.fields, picker.components, strict=True)]  # fmt: skip


def generate(tabs, model, method="softpag", prompt=PROMPT, files=None, call=CALL, **changed):
    tab = tabs.generate
    given = values(tab.picker, **changed)
    return list(shown(tab.generate(ME, model, prompt, 7, method, *call, files, *given)))


def shown(updates):
    """What the updates of a handler say: components and their values."""
    for update in updates:
        yield {c: v.get("value", v) if isinstance(v, dict) else v for c, v in update.items()}


def last(updates, component):
    return [u[component] for u in updates if component in u][-1]


def repeated(command, out, verb, monkeypatch):
    """Run a command of the page with another --out; its files."""
    monkeypatch.chdir(out)
    scenes, _, command = command.rpartition(" && ")
    if scenes:
        subprocess.run(scenes, shell=True, check=True, cwd=out)
    words = shlex.split(command)
    assert words[:2] == ["dittune", verb]
    where = words.index("--") if "--" in words else len(words)
    with pytest.raises(SystemExit) as stop:
        cli.main([*words[1:where], "--out", str(out / "made"), *words[where:]])
    assert stop.value.code == 0
    return out / "made"


@pytest.mark.parametrize("name", dittune.available_methods())
def test_controls_come_from_the_dataclass(tabs, model, name):
    picker, cls = tabs.generate.picker, dittune.load_method(name)
    own = [(s, c) for (n, s), c in zip(picker.fields, picker.components, strict=True) if n == name]
    files = {"patterns"} if name == "sparsed" else set()  # of the server
    assert {s.name for s, _ in own} == {f.name for f in dataclasses.fields(cls)} - files
    for setting, made in own:
        assert made.label == setting.name and made.info == setting.help and setting.help
        kind = {"bool": gr.Checkbox, "bool | None": gr.Radio, "int": gr.Number}
        assert type(made) is kind.get(setting.type, type(made))
        for choice in setting.choices:
            resolve({"methods": {name: {setting.name: choice}}}) if setting.name in (
                "perturbation", "backend", "rows",
            ) else None  # fmt: skip
    given = picker.methods(name, values(picker))
    assert resolve({"model": model, "methods": given}).methods[name] == defaults(model, name)
    assert [u["visible"] for u in picker.show(name)] == [n == name for n in picker.names]
    assert settings_of(cls)[-1].name == "stop"


def test_a_preset_fills_the_controls_of_its_model():
    with gr.Blocks():
        picker = MethodPicker("shapes-sd3", ["softpag"], "softpag")
    heads = dict(
        zip([s.name for _, s in picker.fields], picker.recommend("shapes-sd"), strict=True)
    )
    assert heads["heads"] == defaults("shapes-sd", "softpag")["heads"]
    assert heads["heads"] != picker.methods("softpag", values(picker))["softpag"]["heads"] != ""


@pytest.mark.parametrize(("given", "size"), [("", "64"), (None, "64"), (" 32x48 ", "32x48")])
def test_an_empty_size_is_that_of_the_preset(given, size):
    anywhere = SimpleNamespace(device="auto", dtype="auto")
    made = configuration(anywhere, "shapes-flux", ["x"], 7, ("", 1, None, given), {})
    assert made.size == size and resolve({"model": "shapes-flux"}).size == "64"


CASES = {
    "softpag": {"heads": "0:1,1:*", "u": 0.25, "batched": "no", "first": 2},
    "none": {},
    "regions": {"regions": "0,0,0.5,1: a red circle; 0.5,0,1,1: a blue square"},
    "isolation": {"subjects": "red circle, blue square", "references": 0, "reposition": False},
    "attention_regulation": {"scale": 0.5, "iterations": 2},
}


@pytest.mark.parametrize("method", CASES)
def test_command_and_yaml_repeat_the_picture(tabs, model, method, tmp_path, monkeypatch):
    updates = generate(tabs, model, method, **CASES[method])
    tab, repeat = tabs.generate, tabs.generate.repeat
    after = Path(last(updates, tab.after))
    assert "Done in" in last(updates, tab.line)
    assert (last(updates, tab.before) is None) == (method == "none")
    if method != "none":
        assert Path(last(updates, tab.before)).read_bytes() != after.read_bytes()
    folder = tmp_path / "command"
    folder.mkdir()
    (path,) = repeated(last(updates, repeat.command), folder, "generate", monkeypatch).iterdir()
    assert path.read_bytes() == after.read_bytes()
    files = last(updates, repeat.files)
    assert files[-1].endswith("run.yaml") and last(updates, repeat.yaml)
    folder = tmp_path / "yaml"
    folder.mkdir()
    (folder / "run.yaml").write_text(last(updates, repeat.yaml))
    runs = "dittune generate --config run.yaml"
    (path,) = repeated(runs, folder, "generate", monkeypatch).iterdir()
    assert path.read_bytes() == after.read_bytes()


@pytest.mark.parametrize("prompt", ["-x", "a = b, \"c\" ${d}: 'e' é\nf", "--help"])
def test_odd_prompts_are_repeated_too(tabs, model, prompt, tmp_path, monkeypatch):
    updates = generate(tabs, model, "none", prompt, call=("-no 'x'", 1, None, "32"))
    command = last(updates, tabs.generate.repeat.command)
    (path,) = repeated(command, tmp_path, "generate", monkeypatch).iterdir()
    assert path.read_bytes() == Path(last(updates, tabs.generate.after)).read_bytes()


def test_masks_are_taken_and_offered_again(tabs, model, tmp_path, monkeypatch):
    masks = []
    for i, box in enumerate([(0, 0, 16, 32), (16, 0, 32, 32)]):
        mask = Image.new("L", (32, 32))
        mask.paste(255, box)
        mask.save(path := tmp_path / f"my mask {i}.png")
        masks.append(str(path))
    updates = generate(tabs, model, "isolation", files=masks, **CASES["isolation"])
    files = [Path(file) for file in last(updates, tabs.generate.repeat.files)]
    assert [f.name for f in files[:2]] == ["0-0.png", "0-1.png"]
    assert "folder `masks`" in last(updates, tabs.generate.repeat.note)
    (tmp_path / "masks").mkdir()
    for file in files[:2]:
        (tmp_path / "masks" / file.name).write_bytes(file.read_bytes())
    command = last(updates, tabs.generate.repeat.command)
    assert "isolation.masks=masks" in command
    (path,) = repeated(command, tmp_path, "generate", monkeypatch).iterdir()
    assert path.read_bytes() == Path(last(updates, tabs.generate.after)).read_bytes()
    without = generate(tabs, model, "isolation", **CASES["isolation"])
    assert path.read_bytes() != Path(last(without, tabs.generate.after)).read_bytes()


def test_bad_uploads_are_refused(tabs, model, tmp_path, monkeypatch):
    bad = tmp_path / "mask.png"
    bad.write_bytes(b"nothing")
    updates = generate(tabs, model, "isolation", files=[str(bad)], **CASES["isolation"])
    assert "mask.png is no PNG" in updates[-1][tabs.generate.line]
    assert 'role="alert"' in updates[-1][tabs.generate.line]
    updates = generate(tabs, model, "isolation", **{**CASES["isolation"], "masks": str(tmp_path)})
    assert "upload pictures instead" in updates[-1][tabs.generate.line]
    Image.new("L", (8, 8)).save(bad, format="BMP")
    with pytest.raises(ConfigError, match="is no PNG"):
        uploads.check_mask(bad)
    Image.new("L", (5000, 1)).save(bad)
    with pytest.raises(ConfigError, match="5000x1; a mask has at most 4096"):
        uploads.check_mask(bad)
    monkeypatch.setattr(uploads, "MOST_BYTES", 10)
    with pytest.raises(ConfigError, match="MB; a mask has at most"):
        uploads.check_mask(bad)
    with pytest.raises(ConfigError, match="at most 16 masks, got 17"):
        uploads.keep_masks([str(bad)] * 17, tmp_path)


def test_attention_is_shown_and_a_head_perturbed(tabs, model, studio, tmp_path, monkeypatch):
    tab = tabs.attention
    updates = list(shown(tab.look(ME, model, PROMPT, 7, *CALL)))
    words = last(updates, tab.words)
    assert [word for _, word in words] == ["red", "circle", "blue", "square"]
    seen = last(updates, tab.seen)
    sites = dittune.models.facts_for(studio.pipe(model).transformer).sites(
        studio.pipe(model).transformer
    )
    assert len(seen[1]) == sum(site.heads for site in sites if site.kind == "joint")
    assert all(0 < spread <= 1 for spread in seen[1].values())
    made = repeated(last(updates, tab.repeat.command), tmp_path, "generate", monkeypatch)
    maps, path = sorted(made.iterdir())
    assert path.read_bytes() == Path(last(updates, tab.before)).read_bytes()
    assert maps.name.endswith("-maps.png")
    index = [56 + 30 + 15, 46 + 15]  # layer 0, head 1
    head, _ = tab.clicked(seen, SimpleNamespace(index=index))
    assert head == "0:1"
    updates = list(shown(tab.perturb_heads(ME, seen, head, 1.0, 3.0)))
    record = read_record(last(updates, tab.after))
    assert record["config"]["methods"]["softpag"]["heads"] == "0:1"
    assert "choose a head" in list(shown(tab.perturb_heads(ME, seen, "", 1.0, 3.0)))[-1][tab.line]
    assert (
        "Press Look first"
        in list(shown(tab.perturb_heads(ME, None, "0:1", 1.0, 3.0)))[-1][tab.line]
    )


def test_a_story_is_told_and_repeated(tabs, model, tmp_path, monkeypatch):
    tab = tabs.story
    given = ["a ring", *CALL[1:], *values(tab.picker)]
    scenes = "a red circle and a blue square\n\nthe red circle, 100% alone"
    both = "a red circle\na blue square"
    updates = list(shown(tab.tell(ME, model, both, scenes, "maps", 0, "isolation", *given)))
    assert len(last(updates, tab.references)) == 2
    told = [Path(path) for path, _ in last(updates, tab.pictures)]
    plain = [Path(path) for path, _ in last(updates, tab.plain)]
    for scene, alone in zip(told, plain, strict=True):
        said, plainly = read_record(scene), read_record(alone)
        assert (said["seed"], said["prompt"]) == (plainly["seed"], plainly["prompt"])
        assert not plainly["config"]["methods"] and scene.read_bytes() != alone.read_bytes()
    folder = tmp_path / "command"
    folder.mkdir()
    made = repeated(last(updates, tab.repeat.command), folder, "story", monkeypatch)
    assert [(made / p.name).read_bytes() for p in told] == [p.read_bytes() for p in told]
    folder = tmp_path / "yaml"
    folder.mkdir()
    (folder / "run.yaml").write_text(last(updates, tab.repeat.yaml))
    runs = last(updates, tab.repeat.note).split("run by `")[1].split("`")[0]
    made = repeated(runs, folder, "story", monkeypatch)
    assert [(made / p.name).read_bytes() for p in told] == [p.read_bytes() for p in told]
    updates = list(shown(tab.tell(ME, model, "x", scenes, "os:system", 0, "isolation", *given)))
    assert "masks is one of maps, shapes" in updates[-1][tab.line]
    many = "\n".join(f"a {'very ' * i}red circle" for i in range(9))
    updates = list(shown(tab.tell(ME, model, many, scenes, "maps", 0, "isolation", *given)))
    assert "at most 8 subjects" in updates[-1][tab.line]


def test_a_video_is_filmed_and_repeated(tmp_path, monkeypatch):
    tiny_video.wan().save_pretrained(tmp_path / "wan")
    studio = Studio([str(tmp_path / "wan")])
    with gr.Blocks():
        tab = VideoTab(studio)
    given = [*CALL, *values(tab.picker)]
    film = [ME, str(tmp_path / "wan"), "a red circle", 7, 5, 8, "softpag", *given]
    updates = list(shown(tab.film(*film)))
    assert "Done in" in last(updates, tab.line), last(updates, tab.line)
    command = last(updates, tab.repeat.command)
    made = repeated(command, tmp_path, "video", monkeypatch)
    after = Path(last(updates, tab.after))
    assert (made / after.name).read_bytes() == after.read_bytes()
    assert len(build(studio).blocks) > 20  # without a picture model, the other tabs say so


def test_without_a_video_model_the_page_says_so(studio):
    page = build(studio)
    texts = [b.value for b in page.blocks.values() if isinstance(b, gr.Markdown)]
    assert any("No video model here" in (text or "") for text in texts)


def installed(pipe):
    return [id(p) for p in pipe.transformer.attn_processors.values()], type(pipe.transformer)


def test_cancel_restores_the_model_by_identity(tabs, model, studio):
    pipe, tab = studio.pipe(model), tabs.generate
    before = installed(pipe)
    running = tab.generate(
        ME, model, PROMPT, 7, "softpag", "", 40, 2.0, "32", None,
        *values(tab.picker, heads="0:1"),
    )  # fmt: skip
    lines = []
    for update in shown(running):
        lines.append(update[tab.line])
        if "With the method: step" in lines[-1]:
            assert installed(pipe) != before
            assert studio.cancel("me") and not studio.cancel("you")
    assert CANCELLED in lines[-1]
    with studio._locks[model]:  # given back
        assert installed(pipe) == before and type(pipe) is type(tiny.sd3())
    assert not studio._running and tab.after not in update


def test_cancel_does_not_wait_for_the_end_of_a_step(model, studio):
    """Some methods call the denoiser twenty times in one."""
    watch, pipe, calls = Watch(), studio.pipe(model), []

    def count(*_):
        calls.append(1)
        if len(calls) == 3:
            watch.stop()

    counting = pipe.transformer.register_forward_pre_hook(count)
    method = dittune.AttendAndExcite(concepts="red, circle", scale=0.01)
    with pytest.raises(Cancelled), studio.lend(model, watch) as lent:
        lent.methods = [method]
        lent(PROMPT, seed=7, num_inference_steps=2, height=32, width=32)
    assert len(calls) == 3
    counting.remove()
    assert not pipe.transformer._forward_pre_hooks


def test_users_do_not_see_each_other(tabs, model):
    tab = tabs.generate
    jobs = [("softpag", {"heads": "0:1"}), ("none", {}), ("softpag", {"heads": "1:*"})] * 2

    def make(job):
        return Path(last(generate(tabs, model, job[0], **job[1]), tab.after)).read_bytes()

    alone = [make(job) for job in jobs]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(make, jobs)) == alone


def test_errors_are_sentences(tabs, model, monkeypatch, capsys):
    line = tabs.generate.line
    for changed, text in (
        ({"heads": "99:0"}, "99"),
        ({"heads": "0:1", "u": 3.0}, "u is in [0, 1], got 3.0"),
        ({"prompt": "  "}, "a prompt is empty"),
        ({"call": ("", 20, 2.0, "31x7")}, "width must be"),
        ({"call": ("", 20, 2.0, "5000")}, "at most 2359296 pixels"),
        ({"prompt": "x" * 3000}, "at most 2000 letters"),
        ({"heads": "0:1," * 1000}, "settings of at most 2000 letters"),
        ({"method": "conform", "refinements": 1000}, "at most 50 refinements"),
    ):
        said = generate(tabs, model, **changed)[-1][line]
        assert text in said and 'role="alert"' in said and "Traceback" not in said
    monkeypatch.setattr(works, "run", lambda *_: 1 / 0)
    said = generate(tabs, model, "none")[-1][line]
    assert "did not expect" in said and "division" not in said
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_neutral_settings_are_told(tabs, model):
    assert "changed nothing" in last(generate(tabs, model, heads=""), tabs.generate.line)


@pytest.mark.parametrize("family", ["sd3", "flux", "sd"])
def test_previews_have_the_size_of_the_picture(family):
    pipe, seen = tiny.FAMILIES[family](), []
    longer = {"max_sequence_length": 16} if family == "flux" else {}

    def look(pipe, step, timestep, tensors):
        seen.append(decode(pipe, tensors["latents"], 48, 16).size)
        return {}

    pipe("x", num_inference_steps=1, height=16, width=48, callback_on_step_end=look, **longer)
    assert seen == [(48, 16)]


@pytest.fixture
def served(studio, model):
    """The page, clients of it, and the arguments of a request of so many steps."""
    client = pytest.importorskip("gradio_client")
    page = launch(studio, 0, False, 1, prevent_thread_lock=True, quiet=True)

    def users(count):
        return [client.Client(page.local_url, verbose=False) for _ in range(count)]

    def request(user, steps):
        names = user.view_api(print_info=False, return_format="dict")["named_endpoints"]
        given = [p.get("parameter_default") for p in names["/generate"]["parameters"]]
        return [model, "x", 7, "none", "", steps, 1.0, "32", *given[8:]]

    yield page, users, request
    page.close(verbose=False)
    gc.collect()


def test_a_full_queue_says_so(served):
    _, users, request = served
    six = users(6)
    given = request(six[0], steps=100)
    jobs = [user.submit(*given, api_name="/generate") for user in six]
    said = {str(job.exception()) for job in jobs} - {"None"}
    assert said == {"Queue is full! Please try again."}


def test_requests_leave_nothing_in_a_session(served):
    page, users, request = served
    (user,) = users(1)
    given = request(user, steps=2)
    for _ in range(3):
        user.predict(*given, api_name="/generate")
    (session,) = page.state_holder.session_data.values()
    assert session.blocks_config.blocks.keys() == page.blocks.keys()


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("dittune.pipelines.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo"])
    assert stop.value.code == 2
    assert "pip install 'dittune[demo]'" in capsys.readouterr().err
