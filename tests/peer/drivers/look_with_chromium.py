"""Open pages in headless Chromium, at several widths, light and dark; tell what it asked for and said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

MEASURES = """() => ({
  page: [document.documentElement.scrollWidth, document.documentElement.clientWidth],
  background: getComputedStyle(document.body).backgroundColor,
  pictures: [...document.querySelectorAll('figure svg')].map(svg => {
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim());
    const card = svg.closest('.card').getBoundingClientRect();
    return {
      width: box.width, height: box.height, marks: svg.querySelectorAll('path, use').length,
      letters: Math.min(...texts.map(t => t.getBoundingClientRect().height)),
      inside: texts.every(t => { const b = t.getBoundingClientRect();
        return b.left >= card.left - 1 && b.right <= card.right + 1; }),
    };
  }),
})"""
"""What a reader would see: overflow of the page, and size, marks and letters of every picture."""


def look(page: Page, job: dict[str, Any], out: str) -> dict[str, Any]:
    """Open one page, measure it and take its picture."""
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(Path(job["page"]).as_uri())
    page.screenshot(path=out, full_page=True)
    measured = page.evaluate(MEASURES)
    page.keyboard.press("Tab")
    focus = page.evaluate("document.activeElement.textContent")
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    opened = page.evaluate(MEASURES)["page"]
    return {"asked": asked, "said": said, "opened": opened, "focus": focus, **measured}


def main() -> None:
    """Answer a request: `{"chromium", "jobs": [{"page", "widths", "out"}]}`."""
    request = json.loads(Path(sys.argv[1]).read_text())
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"]  # a container's root may not make one
        browser = playwright.chromium.launch(executable_path=request["chromium"], args=arguments)
        for job in request["jobs"]:
            found = {}
            for width in job["widths"]:
                for scheme in ("light", "dark"):
                    context = browser.new_context(
                        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
                    )
                    key = f"{width}-{scheme}"
                    found[key] = look(context.new_page(), job, f"{job['out']}-{key}.png")
                    context.close()
            Path(job["out"] + ".json").write_text(json.dumps(found))
        browser.close()


if __name__ == "__main__":
    main()
