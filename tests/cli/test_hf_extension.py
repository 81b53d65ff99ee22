"""`hf zipit ...`: the console script is what `hf` looks for in an extension."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
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


def test_the_doctor_looks_where_hf_does() -> None:
    assert Path(doctor.EXTENSION) == extensions.EXTENSIONS_ROOT / "hf-zipit" / extensions.MANIFEST_FILENAME
