"""What a run emits: grams of CO2 equivalents, as codecarbon estimates them from a machine's power and its country."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hf_zipit.errors import RecipeError
from hf_zipit.extras import require

Emitted = Callable[[], dict[str, Any] | None]
"""Ends the measurement and says what was emitted, as the metadata of a card has it; None where nobody asked."""


@contextmanager
def emissions(country: str | None) -> Iterator[Emitted]:
    """Measure what happens within, for a country by its ISO code of three letters; nothing is sent anywhere.

    Raises ZipItError if codecarbon is not installed, and RecipeError if it does not know the country.
    """
    if country is None:
        yield lambda: None
        return
    require("codecarbon")
    from codecarbon import OfflineEmissionsTracker
    from codecarbon.input import DataSource

    code = country.upper()
    if code not in DataSource().get_global_energy_mix_data():
        raise RecipeError(
            f"There is no country {country!r}; give the ISO code of three letters of where the machine stands, as FRA."
        )
    settings = {"save_to_file": False, "log_level": "error", "allow_multiple_runs": True}
    tracker = OfflineEmissionsTracker(country_iso_code=code, **settings)
    tracker.start()

    def emitted() -> dict[str, Any]:
        grams = 1000 * (tracker.stop() or 0.0)
        found = tracker.final_emissions_data
        return {
            "emissions": float(f"{grams:.3g}"),
            "source": f"codecarbon {found.codecarbon_version}",
            "training_type": "merging",
            "geographical_location": found.country_name or code,
            "hardware_used": ", ".join(filter(None, (found.cpu_model, found.gpu_model))),
        }

    try:
        yield emitted
    finally:
        tracker.stop()
