"""The picture on the home page, drawn from the README's table: `python -m benchmarks.home`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from hf_zipit.report.plots import COLOURS, add_legend, drawing, save_picture

ROW = re.compile(r"^\| (?P<pair>[^|]+) \| (?P<average>[\d.]+) % \| (?P<refit>[\d.]+) % \|$", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/kept.png"))
    arguments = parser.parse_args()
    rows = [found.groupdict() for found in ROW.finditer(Path("README.md").read_text(encoding="utf-8"))]
    places = range(len(rows))
    with drawing(8.4, 0.9 + 0.45 * len(rows), **{"axes.grid.axis": "x"}) as figure:
        axis = figure.subplots()
        for shift, name, told, colour in (
            (-0.19, "average", "average of the weights", "#B8B8B8"),
            (0.19, "refit", "hf_zipit", COLOURS[0]),
        ):
            values = [float(row[name]) for row in rows]
            axis.barh([place + shift for place in places], values, 0.36, color=colour, label=told, zorder=3)
            for place, value in zip(places, values, strict=True):
                axis.text(value + 0.8, place + shift, f"{value:.1f} %", va="center", fontsize=9)
        axis.set_yticks(places, [row["pair"] for row in rows])
        axis.invert_yaxis()
        axis.set_xlim(0, 114)
        axis.set_xticks(range(0, 101, 20))
        axis.set_xlabel("share of the experts' mean score that one merged model keeps, in %")
        add_legend(figure, axis)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        save_picture(figure, arguments.out)


if __name__ == "__main__":
    main()
