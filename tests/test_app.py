"""The page to try a merge on: what it does, that Gradio serves it, and that a person can use it in a browser."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset

import hf_zipit
from hf_zipit import app
from hf_zipit.errors import RecipeError, ZipItError
from tests import tiny

SPACE = Path(__file__).parents[1] / "spaces" / "hf-zipit"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts and unlabelled data."""
    room = tmp_path_factory.mktemp("world")
    for seed, task in enumerate(("cats", "dogs")):
        tiny.build("vit", seed, num_labels=3 + seed).save_pretrained(room / task)
    pixels = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(0)).tolist()
    Dataset.from_dict({"pixel_values": pixels}).save_to_disk(room / "pictures")
    return room


def experts(world: Path) -> dict[str, str]:
    return app.named(str(world / "cats"), str(world / "dogs"))


def test_it_says_whether_models_fit_and_what_a_merge_would_cost(world: Path):
    planned = hf_zipit.plan(experts(world))
    told = app.examined(experts(world), 16)
    assert "both are a `ViTForImageClassification`" in told
    assert (
        f"| merged | {planned.parameters['merged']:,}, of which {planned.parameters['trunk']:,} are shared |" in told
    )


def test_it_merges_at_several_depths_and_hands_the_deepest_out(world: Path, tmp_path: Path):
    said = []
    found = app.merged(experts(world), str(world / "pictures"), 16, [0.5, 1.0], False, tmp_path, said.append)
    assert [row[0] for row in found.rows] == ["1.00", "0.50"] and len(found.head) == len(found.rows[0])
    assert "answers as its experts do in" in found.summary and said
    assert found.picture.stat().st_size > 10_000
    zipfile.ZipFile(found.archive).extractall(tmp_path / "unpacked")
    model = hf_zipit.ZipItForImageClassification.from_pretrained(tmp_path / "unpacked")
    assert model.config.tasks == ["cats", "dogs"] and model.config.depth == 1.0
    assert f"{model.num_parameters():,}" == found.rows[0][1]


def test_models_that_do_not_fit_are_told_what_differs(world: Path):
    for field, told in {
        "hidden_size": "take experts of one width",
        "num_hidden_layers": "take experts of one depth",
    }.items():
        tiny.build("vit", 2, **{field: 16}).save_pretrained(world / field)
        with pytest.raises(ZipItError, match=rf"{field}: \d+ for 'cats', 16 for '{field}'; {told}"):
            app.examined(app.named(str(world / "cats"), str(world / field)), 16)


def test_what_is_missing_or_not_allowed_is_a_sentence(world: Path, tmp_path: Path):
    assert list(app.named("me/vit", "you/vit@v2")) == ["vit", "vit-2"]
    with pytest.raises(RecipeError, match="Model 2 is empty"):
        app.named("me/vit", " ")
    with pytest.raises(RecipeError, match="is not an id of a model on the Hub"):
        app.named(str(world / "cats"), "me/vit", only_hub=True)
    for data, depths, told in (("", [1.0], "name a data set"), ("me/x", [], "at least one depth")):
        with pytest.raises(RecipeError, match=told):
            app.merged(experts(world), data, 16, depths, False, tmp_path)


def test_the_space_is_one_that_would_deploy():
    header = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert header["sdk"] == "gradio" and (SPACE / header["app_file"]).is_file()
    assert len(header["short_description"]) <= 60
    assert "hf-zipit[app]" in (SPACE / "requirements.txt").read_text(encoding="utf-8")
    compile((SPACE / "app.py").read_text(encoding="utf-8"), "app.py", "exec")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    pytest.importorskip("gradio")
    found, page = app.launch(block=False)
    yield found
    page.close()


def test_gradio_serves_it(world: Path, address: str):
    from gradio_client import Client

    client = Client(address, verbose=False)
    told = client.predict(str(world / "cats"), str(world / "dogs"), 16, api_name="/check")
    assert "**They fit**" in told
    assert client.predict(str(world / "cats"), "", 16, api_name="/check").startswith(
        "**This cannot be done.** Model 2"
    )


def test_a_person_can_use_it_in_a_browser(world: Path, address: str, tmp_path: Path):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        asked, broken = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(address)
        page.get_by_label("Model 1").fill(str(world / "cats"))
        page.get_by_label("Model 2").fill(str(world / "dogs"))
        page.get_by_role("button", name="Check").click()
        page.locator("#plan").get_by_text("They fit").wait_for()
        page.get_by_label("Data", exact=True).fill(str(world / "pictures"))
        page.get_by_role("button", name="Merge").click()
        page.locator("#summary").get_by_text("answers as its experts do").wait_for(timeout=60_000)
        page.locator("#picture img").wait_for()
        assert page.locator("#table").get_by_text("0.50").count()
        with page.expect_download() as download:
            page.locator("#archive a[download]").first.click()
        download.value.save_as(tmp_path / "merged.zip")
        assert "config.json" in zipfile.ZipFile(tmp_path / "merged.zip").namelist()
        browser.close()
    assert broken == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
