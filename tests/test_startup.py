"""The face is light: what takes seconds to import is imported by who needs it, when it is needed.

Times are in `benchmarks/startup.py`; here stands what makes them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hf_zipit
from hf_zipit import modeling

SELDOM = {"datasets", "evaluate", "matplotlib", "optuna", "peft", "sklearn"}
HEAVY = {*SELDOM, "torch", "transformers"}


TELL = "import sys\nprint('\\n' + ' '.join(sys.modules))"

KNOWN = """
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
config = AutoConfig.for_model("zipit")
print(type(config).__name__, type(config) in AutoModel._model_mapping, end=" ")
print(AutoModelForImageClassification._model_mapping[type(config)].__name__)
"""
FOUND = "ZipItConfig True ZipItForImageClassification\n"


def ask(code: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(code: str) -> set[str]:
    """Packages that a fresh process has imported after `code`."""
    return set(ask(f"{code}\n{TELL}").splitlines()[-1].split())


def command(*arguments: str) -> str:
    return f"import sys\nfrom hf_zipit.cli import main\nsys.argv = ['hf-zipit', *{arguments}]\ntry: main()\n" + (
        "except SystemExit: pass"
    )


@pytest.mark.parametrize("code", ["import hf_zipit", command("--help"), command("merge", "--help")])
def test_the_face_and_the_help_import_nothing_heavy(code):
    assert imported(code) & HEAVY == set()


@pytest.mark.parametrize("name", sorted(hf_zipit.HOMES))
def test_every_name_of_the_face_is_there(name):
    assert getattr(hf_zipit, name).__name__ in (name, "register", f"hf_zipit.evaluation.{name}")
    assert name in dir(hf_zipit) and name in hf_zipit.__all__


def test_other_names_are_not():
    for package in (hf_zipit, modeling):
        with pytest.raises(AttributeError, match="no attribute 'unzip'"):
            package.unzip  # noqa: B018 - this asks for it


def test_no_name_of_the_face_is_a_package():
    assert {path.stem for path in Path(hf_zipit.__file__).parent.iterdir()} & set(hf_zipit.HOMES) == set()


def test_auto_classes_know_merged_models_in_any_order_of_imports():
    """The other orders, hf_zipit first or our classes alone, are in the tests below, whose processes run anyway."""
    assert ask("from transformers import AutoModel; import hf_zipit" + KNOWN) == FOUND


def test_what_few_need_is_not_imported_by_models_nor_by_merging_and_measuring():
    face = "import hf_zipit; hf_zipit.merge, hf_zipit.evaluate, hf_zipit.search; import hf_zipit.report.plots"
    told = ask(f"from hf_zipit.modeling import ZipItModel{KNOWN}{face}\n{TELL}")
    assert told.startswith(FOUND)
    # transformers' own modules import scikit-learn
    assert set(told.splitlines()[-1].split()) & (SELDOM - {"sklearn"}) == set()


MISSING = ("datasets", "evaluate", "matplotlib", "sklearn", "PIL")


def test_tensors_are_merged_and_saved_where_what_few_need_is_not_installed(tmp_path):
    code = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in {MISSING} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
import torch, hf_zipit
{KNOWN}
from tests import tiny

experts = dict(zip("ab", tiny.pair("vit", (0, 1), (3, 4))))
data = {{task: torch.randn(8, 3, 16, 16) for task in experts}}
merged = hf_zipit.merge(experts, data, refit=True)
found = hf_zipit.evaluate(merged, {{t: [{{"pixel_values": x, "labels": 0}} for x in data[t]] for t in data}})
merged.save_pretrained({str(tmp_path)!r})
print(merged(pixel_values=data["a"]).logits.shape[1], sum(found.model.samples.values()))
"""
    assert ask(code) == FOUND + "7 16\n"
    written = {path.name for path in tmp_path.iterdir()}
    assert "README.md" in written and not any(name.endswith(".png") for name in written)
    assert "refit_errors.png" not in (tmp_path / "README.md").read_text()
