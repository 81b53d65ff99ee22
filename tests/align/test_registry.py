"""Names are found in a room's files, and what is wrong with a name or an option is said in one sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import hf_zipit.align
from hf_zipit.align.method import register
from hf_zipit.errors import RecipeError
from hf_zipit.registry import METHODS, RULES, Registry, check_options, options_of


def test_methods_of_the_room_are_found_and_say_what_they_need():
    assert {"identity", "permute", "zip"} <= set(METHODS)
    assert METHODS.get("identity").needs == frozenset()
    assert METHODS.get("zip").needs == {"moments"}
    assert "average" in RULES


def test_a_method_is_one_new_file(tmp_path, monkeypatch):
    room = tmp_path / "a_room"
    room.mkdir()
    (room / "__init__.py").write_text("")
    (room / "registry.py").write_text(
        "from hf_zipit.registry import Registry\nTHINGS = Registry('thing', package='a_room', group='a_group')\n"
    )
    (room / "new.py").write_text("from a_room.registry import THINGS\nTHINGS.add('new', 7)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import a_room.registry

    assert a_room.registry.THINGS.names() == ("new",)
    assert a_room.registry.THINGS.get("new") == 7
    for module in [name for name in sys.modules if name.split(".")[0] == "a_room"]:
        del sys.modules[module]


def test_a_name_cannot_be_taken_twice():
    things: Registry[int] = Registry("thing", package="hf_zipit.combine", group="things")
    things.add("one", 1)
    with pytest.raises(ValueError, match="two things named 'one'"):
        things.add("one", 2)


def test_unknown_names_and_options_get_a_suggestion():
    with pytest.raises(RecipeError, match="no method named 'zipp'; did you mean 'zip'"):
        METHODS.get("zipp")
    with pytest.raises(RecipeError, match="choose one of .*identity.*permute.*zip"):
        METHODS.get("qqqq")
    with pytest.raises(RecipeError, match="'zip' has no option 'aplha'; did you mean 'alpha'"):
        check_options("zip", METHODS.get("zip").function, {"aplha": 1})
    with pytest.raises(RecipeError, match="takes none"):
        check_options("identity", METHODS.get("identity").function, {"alpha": 1})


def test_options_are_the_keyword_only_parameters_with_their_defaults():
    options = options_of(METHODS.get("zip").function)
    assert {name: option.default for name, option in options.items()} == {
        "alpha": 0.3, "beta": 0.125, "size": 1.0, "compat": False,
    }  # fmt: skip


def test_a_matcher_cannot_need_weights():
    with pytest.raises(ValueError, match="network"):
        register("impossible", needs={"weights"})(lambda correlation, experts: None)
    assert "impossible" not in METHODS


def test_the_engine_imports_no_method():
    """Methods are many, and third parties add theirs: what runs them knows them by name only, and they each other."""
    folder = Path(hf_zipit.align.__file__).parent
    for path in folder.rglob("*.py"):
        assert "import hf_zipit.align.methods" not in path.read_text(), path
        assert "from hf_zipit.align.methods" not in path.read_text(), path
