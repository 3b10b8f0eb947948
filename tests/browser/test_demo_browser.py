"""The page of `dittune demo` as people use it, in headless Chromium.

`DITTUNE_CHROMIUM` names the browser if it is neither installed nor playwright's own;
`DITTUNE_SCREENSHOTS` a folder that gets the pictures of docs/demo.md.
"""

import gc
import os
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

from PIL import Image  # noqa: E402

import dittune  # noqa: E402
from dittune.pipelines.demo.page import FIRST, launch  # noqa: E402
from dittune.pipelines.demo.studio import Studio  # noqa: E402
from tests.gradio_warnings import IGNORED  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.browser, IGNORED]
MODELS = sorted(dittune.available_checkpoints(), key=lambda name: name != FIRST)
SHOTS = os.environ.get("DITTUNE_SCREENSHOTS")
PATIENCE = 120_000  # milliseconds, for a machine that does other things too


@pytest.fixture(scope="module")
def server():
    studio = Studio(MODELS)
    page = launch(studio, 0, False, 4, prevent_thread_lock=True, quiet=True)
    yield studio, page.local_url
    page.close(verbose=False)
    gc.collect()


@pytest.fixture(scope="module")
def browser():
    installed = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    own = os.environ.get("DITTUNE_CHROMIUM") or next(filter(None, installed), None)
    with playwright.sync_playwright() as driver:
        # `-m slow` takes these tests along where nobody asked for a browser. Only its absence skips
        # them: one that is there and does not start is an error.
        if own is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("no Chromium here; `playwright install chromium` gets one")
        started = driver.chromium.launch(executable_path=own, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(server, browser):
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE)
    troubles = []
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.goto(server[1])
    opened.get_by_role("tab", name="Generate").wait_for()
    yield opened
    context.close()
    assert not troubles


def shoot(page, name):
    if SHOTS:
        page.wait_for_timeout(600)  # pictures fade in
        path = Path(SHOTS) / f"{name}.png"
        page.mouse.move(5, 5)
        page.screenshot(path=path, full_page=True)
        with Image.open(path) as shot:
            shot.convert("RGB").quantize(128).save(path, optimize=True)
        assert path.stat().st_size < 200_000


def visible(page, text):
    found = page.get_by_text(text).locator("visible=true").first
    found.wait_for()
    return found


def press(page, name):
    page.get_by_role("button", name=name, exact=True).locator("visible=true").first.click()


def open_tab(page, name):
    page.get_by_role("tab", name=name).click()


def settings(page):
    page.get_by_text("Settings of the method").locator("visible=true").first.click()


def choose_method(page, name):
    box = page.get_by_label("Method", exact=True).locator("visible=true").first
    box.click()
    page.get_by_role("option", name=name, exact=True).click()


def source(page, label):
    shown = page.get_by_role("img", name=label).locator("visible=true").first
    shown.wait_for()
    return shown.get_attribute("src")


def test_generate_and_change_the_method(page):
    press(page, "Generate")
    done = visible(page, re.compile(r"Done in .* seed 0\."))
    assert "changed" in done.inner_text() and "nothing" not in done.inner_text()
    before, after = (source(page, f"the picture {how} the method") for how in ("without", "with"))
    assert before != after
    visible(page, "dittune generate")
    shoot(page, "generate")
    choose_method(page, "attention_regulation")
    settings(page)
    visible(page, "Add bumps to the logits of words")
    assert page.get_by_label("iterations").locator("visible=true").first.input_value() == "20"
    assert page.get_by_label("perturbation").locator("visible=true").count() == 0
    shoot(page, "methods")
    press(page, "Generate")
    visible(page, "attention_regulation")
    page.wait_for_function(
        "src => [...document.querySelectorAll('img')].every(i => i.src !== src)", arg=after
    )


def test_what_cannot_be_is_said_in_a_sentence(page):
    settings(page)
    page.get_by_label("u", exact=True).locator("visible=true").first.fill("3")
    press(page, "Generate")
    alert = page.get_by_role("alert").locator("visible=true").first
    alert.wait_for()
    assert alert.inner_text() == "softpag: u is in [0, 1], got 3.0"
    assert "Traceback" not in page.content()


def test_cancel_leaves_the_model_as_it_was(server, page):
    studio, _ = server
    model = studio.pipe("shapes-sd3").transformer
    processors = [*model.attn_processors.values()]
    page.get_by_text("More settings").locator("visible=true").first.click()
    page.get_by_label("Steps").locator("visible=true").first.fill("100")
    press(page, "Generate")
    visible(page, re.compile(r"step \d+ of 100"))
    shoot(page, "progress")
    press(page, "Cancel")
    visible(page, "Cancelled")
    page.wait_for_timeout(3000)
    assert [id(p) for p in model.attn_processors.values()] == [id(p) for p in processors]
    assert type(model).__name__ == "SD3Transformer2DModel" and not studio._running
    assert not studio._locks["shapes-sd3"].locked()


def test_a_head_is_clicked(page):
    open_tab(page, "Attention")
    press(page, "Look")
    visible(page, "words, 24 heads")
    grid = page.locator(".heads img").first
    grid.wait_for()
    box, (width, height) = grid.bounding_box(), (366, 266)  # of heat_map.draw, for 6 x 4 heads
    scale = min(box["width"] / width, box["height"] / height)
    left, top = (box["width"] - width * scale) / 2, (box["height"] - height * scale) / 2
    x, y = 56 + 1.5 * 30, 46 + 2.5 * 30  # the middle of layer 2, head 1
    grid.click(position={"x": left + x * scale, "y": top + y * scale})
    visible(page, "Heads 2:1. Done in")
    assert page.get_by_label("Heads to perturb").input_value() == "2:1"
    visible(page, "softpag.heads=2:1")
    shoot(page, "attention")


def test_a_bad_mask_is_refused(page, tmp_path):
    choose_method(page, "isolation")
    settings(page)
    page.get_by_label("subjects").locator("visible=true").first.fill("red circle, blue square")
    page.get_by_label("references").locator("visible=true").first.fill("0")
    bad = tmp_path / "mask.png"
    bad.write_bytes(b"not a picture")
    visible(page, "Masks: a PNG a subject")  # it comes with the method, from the server
    page.locator("input[type=file]").first.set_input_files(str(bad))
    visible(page, "mask.png")
    press(page, "Generate")
    alert = page.get_by_role("alert").locator("visible=true").first
    alert.wait_for()
    assert "mask.png is no PNG picture" in alert.inner_text()
    shoot(page, "mask")


def test_a_story(page):
    open_tab(page, "Story")
    press(page, "Tell the story")
    visible(page, "2 scenes of 2 subjects.")
    visible(page, "--subject")
    shoot(page, "story")


def test_a_video_is_filmed(page):
    open_tab(page, "Video")
    press(page, "Film")
    visible(page, re.compile(r"Done in .* seed \d+\."))
    visible(page, "dittune video")
    players = page.locator("video").locator("visible=true")
    page.wait_for_function(
        "() => [...document.querySelectorAll('video')].filter(v => v.videoWidth === 64).length > 1"
    )
    before, after = (players.nth(i).get_attribute("src") for i in range(2))
    assert before != after
    shoot(page, "video")


def test_the_gallery_shows_a_preset_and_opens_it(page):
    open_tab(page, "Gallery")
    press(page, "Show shapes-sd3")
    visible(page, "Done in")
    shoot(page, "gallery")
    page.get_by_role("button", name="Open in Generate").first.click()
    page.get_by_role("tab", name="Generate", selected=True).wait_for()
    visible(page, "Method")
