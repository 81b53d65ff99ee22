"""The picture of the page in the docs: `python -m benchmarks.screenshots`, after `make quickstart`.

Needs the extra `app`, playwright and Debian's chromium; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from hf_zipit import app

EXPERTS = ("out/quickstart/experts/low", "out/quickstart/experts/high")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/app.png"))
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    address, served = app.launch(block=False)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900}, color_scheme="light")
        page.goto(address)
        for number, expert in enumerate(EXPERTS, 1):
            page.get_by_label(f"Model {number}").fill(expert)
        page.get_by_label("Data", exact=True).fill("sklearn-digits")
        page.get_by_label("Measure on the labels of the split test").check()
        page.get_by_role("button", name="Check").click()
        page.locator("#plan").get_by_text("They fit").wait_for()
        page.get_by_role("button", name="Merge").click()
        page.locator("#picture img").wait_for(timeout=120_000)
        page.wait_for_timeout(500)  # the table is drawn after it is there
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=arguments.out, full_page=True)
        browser.close()
    served.close()


if __name__ == "__main__":
    main()
