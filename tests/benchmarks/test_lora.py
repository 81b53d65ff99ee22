"""The benchmark of LoRA rules asks for settings that there are, and names what it chose."""

from __future__ import annotations

from benchmarks.lora import row, settings_of, words
from hf_zipit.registry import LORA_RULES, RULES, check_options


def test_every_setting_that_is_tried_is_one_of_the_rules() -> None:
    for rule in LORA_RULES:
        for _, every in settings_of(rule):
            assert len(every) == len({str(options) for options in every})
            for options in every:
                known = check_options(rule, LORA_RULES.get(rule).function, options)
                if "combine" in known:
                    inner = RULES.get(known["combine"]).function
                    check_options(known["combine"], inner, options.get("options", {}))
            assert words(every[0]) == ""  # the defaults come first


def test_a_row_names_options_and_is_sorted_by_the_mean_share() -> None:
    assert words({"weights": [0.4, 0.4]}) == ", weights 0.4 each"
    assert words({"combine": "ties", "options": {"share": 0.5, "scale": 1.5}}) == ", share 0.5, scale 1.5"
    mean, line = row("`linear`", {"a": 0.4, "b": 0.9}, {"a": 0.8, "b": 0.9}, 2.0, None)
    assert mean == 0.75
    assert line == "| `linear` | 50.0 % | 100.0 % | 75.0 % | 50.0 % | 2.0 |  |"
