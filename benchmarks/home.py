"""The picture on the home page, from the README's table with its lowest and highest: `python -m benchmarks.home`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from textwrap import fill

from hf_zipit.report.plots import COLOURS, add_legend, drawing, save_picture

SHARE = r"([\d.]+) %(?: \(([\d.]+) to ([\d.]+)\))?"
ROW = re.compile(rf"^\| ([^|\n]+) \| \d+ \| {SHARE} \| {SHARE} \|$", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/kept.png"))
    arguments = parser.parse_args()
    rows = [found.groups() for found in ROW.finditer(Path("README.md").read_text(encoding="utf-8"))]
    places = range(len(rows))
    with drawing(8.4, 0.9 + 0.5 * len(rows), **{"axes.grid.axis": "x"}) as figure:
        axis = figure.subplots()
        for shift, first, told, colour in (
            (-0.19, 1, "average of the weights", "#B8B8B8"),
            (0.19, 4, "hf_zipit", COLOURS[0]),
        ):
            values = [float(row[first]) for row in rows]
            lowest = [float(row[first + 1] or row[first]) for row in rows]
            highest = [float(row[first + 2] or row[first]) for row in rows]
            spread = [
                [value - low for value, low in zip(values, lowest, strict=True)],
                [high - value for value, high in zip(values, highest, strict=True)],
            ]
            axis.errorbar(
                values, [place + shift for place in places], xerr=spread, fmt="none", ecolor="#404040", zorder=4
            )
            axis.barh([place + shift for place in places], values, 0.36, color=colour, label=told, zorder=3)
            for place, value, high in zip(places, values, highest, strict=True):
                axis.text(high + 0.8, place + shift, f"{value:.1f} %", va="center", fontsize=9)
        axis.set_yticks(places, [fill(row[0], 38) for row in rows])
        axis.invert_yaxis()
        axis.set_xlim(0, 116)
        axis.set_xticks(range(0, 101, 20))
        axis.set_xlabel("share of the experts' mean score that one merged model keeps, in %")
        add_legend(figure, axis)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        save_picture(figure, arguments.out)


if __name__ == "__main__":
    main()
