"""A page in headless Chromium, as people see it on a desk and on a phone."""

import shutil
from pathlib import Path
from typing import Any

import pytest

LAUNCH = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
          "--disable-component-update", "--disable-sync"]  # fmt: skip


def look(page: Any, file: Path) -> tuple[list[str], list[str]]:
    """Opens a report, checks what is seen, and returns what the console says and what was fetched."""
    problems: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    pictures = page.locator("img").all()
    sizes = [picture.evaluate("image => [image.naturalWidth, image.clientWidth]") for picture in pictures]
    assert len(pictures) == len(list((file.parent / "figures").glob("*.svg")))
    assert all(natural > 0 and shown > 300 for natural, shown in sizes)
    assert all(picture.is_visible() and picture.get_attribute("alt") for picture in pictures)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert contrast(page) > 12
    assert "None" not in page.evaluate("document.body.innerText")
    return problems, requests


def contrast(page: Any) -> float:
    """Returns how much lighter the lighter one of text and background is, as WCAG counts it."""
    style = "getComputedStyle(document.body)"
    colours = page.evaluate(f"[{style}.color, {style}.backgroundColor].map(found => found.match(/\\d+/g).map(Number))")
    linear = [[(v / 255 / 12.92 if v < 11 else ((v / 255 + 0.055) / 1.055) ** 2.4) for v in one] for one in colours]
    dark, light = sorted(0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in linear)
    return float((light + 0.05) / (dark + 0.05))


def check_in_browser(page_file: Path) -> None:
    """Opens a page wide and light, then narrow and dark: nothing to complain of, nothing fetched."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=LAUNCH)
        try:
            for width, scheme in ((1280, "light"), (360, "dark")):
                page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
                problems, requests = look(page, page_file)
                assert problems == []
                assert [url for url in requests if not url.startswith("data:")] == [page_file.as_uri()]
        finally:
            browser.close()
