"""`hf zipit ...`: the console script is what `hf` looks for in an extension, and shells to complete a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from datetime import datetime, timezone
from pathlib import Path

import pytest
from huggingface_hub.cli import extensions

from hf_zipit.report import doctor

SCRIPTS = Path(sysconfig.get_path("scripts"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home in which `hf extensions install` has been run: its manifest, with this installation's script."""
    script = SCRIPTS / extensions._get_executable_name("zipit")
    if not script.is_file():
        pytest.skip("hf-zipit is not installed")
    manifest = extensions.ExtensionManifest(
        owner="someone", repo="hf-zipit", repo_id="someone/hf-zipit", short_name="zipit", type="python",
        executable_path=str(script), installed_at=datetime.now(timezone.utc), description="Merges models.",
    )  # fmt: skip
    manifest.save(tmp_path / extensions.EXTENSIONS_ROOT.relative_to("~") / "hf-zipit")
    return tmp_path


def hf(home: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HOME": str(home), "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_hf_runs_us_as_an_extension(home: Path) -> None:
    done = hf(home, "zipit", "doctor", "--json")
    found = {check["what"]: check["found"] for check in json.loads(done.stdout)}
    assert found["hf zipit"] == "yes"
    wrong = hf(home, "zipit", "merge", "a", "b")
    assert wrong.returncode == 2
    assert "Missing option '--out'" in wrong.stderr
    listed = hf(home, "--help")
    assert "zipit" in listed.stdout and "Merges models." in listed.stdout


INSTALL = """
import sys, types
from huggingface_hub.cli import extensions, hf
archive, root = sys.argv[1:]
def told(method, url, **_):
    if url.endswith("pyproject.toml"):
        return types.SimpleNamespace(text=open(root + "/pyproject.toml").read())
    raise OSError(url)
def run(command, **more):
    return subprocess.run([archive if part.startswith("https://github.com") else part for part in command], **more)
subprocess = extensions.subprocess
extensions.subprocess = types.SimpleNamespace(**{**vars(subprocess), "run": run})
extensions._github_request, extensions._github_repo_exists = told, lambda **_: True
sys.argv = ["hf", "extensions", "install", "someone/hf-zipit"]
hf.main()
"""
"""The real `hf extensions install`, but GitHub: it has no network and gets the archive of this tree as a file."""


@pytest.mark.skipif("HF_ZIPIT_NIGHTLY" not in os.environ, reason="HF_ZIPIT_NIGHTLY is not set")
def test_hf_installs_the_extension_and_merges_with_it(tmp_path: Path, vits: Path) -> None:
    root = Path(__file__).parents[2]
    names = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("this tree is in no git repository")
    archive = tmp_path / "HEAD.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name in names.stdout.splitlines():
            packed.write(root / name, f"hf-zipit-HEAD/{name}")
    home = tmp_path / "home"
    environment = {**os.environ, "HOME": str(home), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    environment.pop("PYTHONPATH", None)  # the extension has a Python of its own
    installing = [sys.executable, "-c", INSTALL, str(archive), str(root)]
    done = subprocess.run(installing, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    merging = [
        "zipit",
        "merge",
        str(vits / "low"),
        str(vits / "high"),
        "-m",
        "weights",
        "-o",
        str(tmp_path / "merged"),
    ]
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", *merging]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    listed = hf(home, "extensions", "list").stdout
    assert "someone/hf-zipit" in listed and "Merge Hugging Face models" in listed


def test_the_doctor_looks_where_hf_does() -> None:
    assert Path(doctor.EXTENSION) == extensions.EXTENSIONS_ROOT / "hf-zipit" / extensions.MANIFEST_FILENAME


def test_shells_complete_our_commands() -> None:
    asked = {"_HF_ZIPIT_COMPLETE": "bash_complete", "COMP_WORDS": "hf-zipit ver", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['hf-zipit']; from hf_zipit.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.stdout.split() == ["plain,verify"]
