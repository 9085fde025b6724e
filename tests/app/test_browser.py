"""The explorer and the dashboard in a browser: the system's Chromium, driven by Playwright.

Where there is no Chromium these tests are skipped, except where the environment variable CI is set: there that is a
failure. What they saw is kept in ``build/screenshots/``.
"""

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "build" / "screenshots"
WIDTHS = (1280, 390)
#: Everything that can be operated, with the name that a screen reader says; one without would be "".
CONTROLS = """[...document.querySelectorAll(".px button, .px input, .px select, .px [tabindex='0'], .px a[href]")]
  .filter((node) => node.offsetParent && !node.disabled && node.tabIndex >= 0)
  .map((node) => [node.outerHTML.slice(0, 90), (node.getAttribute("aria-label")
    || [...(node.labels || [])].map((label) => label.textContent).join(" ") || node.textContent).trim()])"""
#: Panels and controls that lie on each other, or stick out of the page.
CLASHES = """(() => {
  const name = (node) => node.outerHTML.slice(0, 70);
  const boxes = [...document.querySelectorAll(
    ".px section, .px h2, .px p, .px dt, .px dd, .px button, .px select, .px input:not([type=radio]):not([type=file])")]
    .filter((node) => node.offsetParent && node.textContent + node.tagName !== "P")
    .map((node) => [node, node.getBoundingClientRect()]);
  const outside = boxes.filter(([, box]) => box.left < -1 || box.right > window.innerWidth + 1);
  const over = boxes.flatMap(([n, a], i) => boxes.slice(i + 1).filter(([m, b]) => !n.contains(m) && !m.contains(n)
    && a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
    .map(([m]) => `${name(n)} lies on ${name(m)}`));
  return [...outside.map(([node]) => `${name(node)} sticks out`), ...over];
})()"""


@pytest.fixture(scope="module")
def chromium():
    """A running browser."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        reason = "There is no chromium on the path; install it (Debian: apt-get install chromium) to run this test."
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        # Chromium has no sandbox for root.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(chromium):
    """A page on which every error of its scripts and every question to another machine is a failure."""
    page, problems = chromium.new_page(viewport={"width": WIDTHS[0], "height": 1000}), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    ours = re.compile(r"(https?://127\.0\.0\.1:\d+/|file:|data:|blob:)")
    page.on("response", lambda response: ours.match(response.url) or problems.append(response.url))
    yield page
    page.close()
    assert not problems


@pytest.fixture(scope="module")
def app():
    """The address of a running explorer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"IPYTHONDIR": str(ROOT / "build" / "ipython"), "PROFILE": "mini"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen([sys.executable, "-m", "patchsae", "app", "--port", str(port)], cwd=ROOT, env=environment,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"
    try:
        _wait_for(address, server)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(address: str, server: subprocess.Popen) -> None:
    """Wait until the server answers; the first start takes the statistics."""
    for _ in range(600):
        assert server.poll() is None, "the explorer's server ended"
        try:
            return urllib.request.urlopen(f"{address}voila/static/main.js", timeout=1).close()
        except urllib.error.HTTPError:
            return None
        except OSError:
            time.sleep(0.5)
    pytest.fail("the explorer's server did not answer")


@pytest.fixture(scope="module")
def explorer(page, app):
    """The page of the explorer, opened by a link once; the tests use it one after the other."""
    page.goto(f"{app}?dataset=nouns/test&image=2&threshold=0.5", timeout=120_000)
    page.locator(".explorer .latents li").first.wait_for(timeout=120_000)
    settle(page)
    return page


def settle(page) -> None:
    """Wait until all that was asked for is there, and drawn."""
    expect(page.locator(".explorer")).to_have_attribute("aria-busy", "false", timeout=20_000)
    page.wait_for_timeout(100)


def look(page, name: str) -> None:
    """Keep pictures of the whole page at both widths, on which nothing may clash."""
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 1000})
        page.wait_for_timeout(100)
        page.evaluate("document.querySelectorAll('*').forEach((node) => { node.scrollTop = 0; })")
        content = page.locator(".px").last.bounding_box()
        # Voila scrolls inside the window, so the window is made as high as the page.
        page.set_viewport_size({"width": width, "height": int(content["y"] + content["height"]) + 40})
        page.wait_for_timeout(150)
        page.screenshot(path=PICTURES / f"{name}_{width}.png")
        assert page.evaluate(CLASHES) == []
    page.set_viewport_size({"width": WIDTHS[0], "height": 1000})


def shares(page) -> dict[str, list[str]]:
    """Probabilities on the page: class -> texts before and after."""
    return {row.locator("th").inner_text(): row.locator("td").first.locator("[data-which]").all_inner_texts()
            for row in page.locator(".probabilities").first.locator("tbody tr").all()}


def test_the_explorer_from_image_to_probability(explorer):
    page = explorer
    assert page.get_by_label("Image", exact=True).input_value() == "2", "the link was not opened"
    page.get_by_role("button", name="Previous").click()
    settle(page)
    look(page, "explorer")
    first = page.locator(".picker img").first.get_attribute("src")
    page.get_by_label("Image", exact=True).fill("3")
    page.get_by_label("Image", exact=True).press("Enter")
    expect(page.locator(".picker img").first).not_to_have_attribute("src", first)

    patches = page.get_by_label("Patches of the image")
    box = patches.bounding_box()
    patches.click(position={"x": box["width"] * 0.56, "y": box["height"] * 0.56})
    expect(page.locator(".hint").first).to_contain_text("Row 5, column 5")
    plain = page.locator(".picker img").first.get_attribute("src")
    strongest = page.locator(".latents input").first
    strongest.check()
    page.get_by_label("Mask of the chosen latent").check()
    expect(page.locator(".picker img").first).not_to_have_attribute("src", plain)

    before = shares(page)
    for latent in range(6):  # the model may say the same without one or two of them
        page.locator(".latents input").nth(latent).check()
        page.get_by_role("button", name="Switch off").click()
        settle(page)
        after = shares(page)
        assert all(before[name][0] == after[name][0] for name in before.keys() & after.keys())
        if changed := any(pair[0] != pair[1] for pair in after.values()):
            break
    assert changed, "switching latents off changed no probability"
    look(page, "explorer_switched_off")

    link = page.get_by_label("Link to what is shown").input_value()
    assert link == page.url and "factors=" in link
    page.get_by_role("button", name="Undo all changes").click()
    settle(page)
    assert shares(page) == before
    with page.expect_download() as download:
        page.get_by_role("button", name="Save the latents (csv)").click()
    assert Path(download.value.path()).read_text().startswith("latent,value,name")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save the figure (png)").click()
    assert Image.open(download.value.path()).format == "PNG"


def picture(size, mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 1 if mode == "1" else (200, 40, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def test_uploads_good_broken_and_too_large(explorer):
    page = explorer
    message, file = page.locator(".message"), page.get_by_label("Upload a picture")
    for name, data, words in (
            ("mine.png", picture((300, 200)), "Your picture of 300 x 200 pixels is shown"),
            ("broken.png", picture((300, 200))[:90], "damaged|not a picture"),
            ("huge.png", picture((10_000, 10_000), "1"), "10,000 x 10,000 pixels, the limit is 24 megapixels"),
            ("long.png", b"\0" * (9 * 2**20), "9.0 MB, the limit is 8 MB")):
        file.set_input_files([{"name": name, "mimeType": "image/png", "buffer": data}])
        expect(message).to_have_text(re.compile(words), timeout=10_000)
    settle(page)
    look(page, "explorer_upload")


def test_the_explorer_by_keyboard_alone(explorer):
    page = explorer
    names = page.evaluate(CONTROLS)
    assert len(names) > 20 and not [control for control, name in names if not name]
    page.get_by_label("Patches of the image").focus()
    hint = page.locator(".hint").first.inner_text()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Shift+ArrowRight")
    expect(page.locator(".hint").first).not_to_have_text(hint)
    page.get_by_label("Data set").focus()
    reached = set()
    for _ in range(60):
        reached.add(page.evaluate("[...document.querySelectorAll('.px section')].indexOf("
                                  "document.activeElement.closest('section'))"))
        page.keyboard.press("Tab")
    panels = page.evaluate("[...document.querySelectorAll('.px section')].map((section, i) => "
                           "section.querySelector('button:enabled, input:enabled') && section.offsetParent ? i : -1)")
    assert reached >= set(panels) - {-1}, "some panels cannot be reached with the tabulator"
    page.locator(".latents input").first.focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator(".latents input").nth(1)).to_be_checked()


def test_the_explorer_finds_latents_by_words_place_and_likeness(explorer):
    page = explorer
    page.get_by_label("words", exact=True).check()
    page.get_by_label("Words in names, or a number").fill("sketch")
    expect(page.locator(".latents .title").first).to_contain_text("sketch")
    settle(page)
    page.locator(".latents input").first.check()
    page.get_by_role("button", name="Similar latents").click()
    expect(page.locator(".latents .value").first).to_have_text("1.00")
    scatter = page.get_by_label("Scatter of all latents")
    box = scatter.bounding_box()
    scatter.click(position={"x": box["width"] * 0.4, "y": box["height"] * 0.6})
    expect(page.get_by_label("the scatter", exact=True)).to_be_checked()
    settle(page)
    look(page, "explorer_scatter")


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    """A dashboard of some latents of the mini profile, on disk."""
    folder = tmp_path_factory.mktemp("figures")
    environment = os.environ | {"PATCHSAE_FIGURES": str(folder), "PROFILE": "mini"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "patchsae", "dashboard", "--latents", "100-170"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "mini" / "dashboard"


def test_the_dashboard_from_the_file_system(page, dashboard):
    page.goto((dashboard / "index.html").as_uri())
    expect(page.locator("#count")).to_have_text("71 latents found, 50 shown")
    page.get_by_label("Name, class or number").fill("cat")
    expect(page.locator("#rows tr").first).to_contain_text("cat")
    assert not [control for control, name in page.evaluate(CONTROLS) if not name]
    look(page, "dashboard")
    page.get_by_label("Name, class or number").fill("")
    page.get_by_role("button", name="frequency").click()
    page.get_by_role("button", name="frequency").click()
    numbers = [float(text) for text in page.locator("#rows td.number:nth-child(4)").all_inner_texts()]
    assert numbers == sorted(numbers, reverse=True)
    assert page.locator("#head th").nth(3).get_attribute("aria-sort") == "descending"

    page.locator("#rows a").first.click()
    expect(page.locator("h1")).to_contain_text("Latent ")
    # An empty canvas is 300 pixels wide; a drawn one is as wide as the images.
    page.wait_for_function("document.querySelector('.references canvas').width < 200")
    before = page.locator(".references").screenshot()
    page.get_by_label("Mask", exact=True).check()
    assert page.locator(".references").screenshot() != before
    look(page, "dashboard_latent")
    page.locator(".neighbours a").first.click()
    expect(page.locator("h1")).to_contain_text("Latent ")
