"""Predicted time of exchanges against measured, as tests/cluster/test_exchange_on_links.py left the figures.

    make soak ARGS="-k on_every_link"          measures, and writes benchmarks/results/exchange-links-DATE.json
    python benchmarks/exchange_links.py --plot benchmarks/results/exchange-links-DATE.json docs/exchange-links.png

The second command needs the extra `docs` (matplotlib). Without `--plot` and with a JSON alone it prints the figures.
"""

import argparse
import json
from pathlib import Path
from typing import Any

TIMES = ("measured_us", "predicted_us")
MARKS = {"rows": "o", "columns": "s", "grid": "^", "grid in two hops": "v"}


def name_of(link: dict[str, Any]) -> str:
    """A link as a reader knows it."""
    return f"{link['mbit']} Mbit/s, {link['delay_us'] / 1000:g} ms"


def report(figures: dict[str, Any]) -> None:
    """Print every exchange, and the worst of each link."""
    for link in figures["links"]:
        node, rank = link["probed"]["node_gb_per_s"], link["probed"]["across"]
        print(
            f"{name_of(link)}: probed {8000 * node:.0f} Mbit/s a node, {8000 * rank['gb_per_s']:.0f} a rank, "
            f"{rank['latency_us'] / 1000:.1f} ms a message"
        )
        for row in link["rows"]:
            print(
                f"  {row['layout']:>16} {row['tokens']:>6} tokens  predicted {row['predicted_us'] / 1000:8.1f} ms  "
                f"measured {row['measured_us'] / 1000:8.1f} ms  {row['deviation']:+.1%}"
            )


def plot(figures: dict[str, Any], path: Path) -> None:
    """Draw predicted against measured times, and how far off they are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, (times, deviations) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    colors = pyplot.rcParams["axes.prop_cycle"].by_key()["color"]
    for color, link in zip(colors, figures["links"], strict=False):
        for row in link["rows"]:
            drawn = {"color": color, "marker": MARKS[row["layout"]], "linestyle": "", "markersize": 6, "alpha": 0.8}
            measured = row["measured_us"] / 1000
            times.plot(measured, row["predicted_us"] / 1000, **drawn)
            deviations.plot(measured, 100 * row["deviation"], **drawn)
        times.plot([], [], color=color, marker="o", linestyle="", label=name_of(link))
    for layout, mark in MARKS.items():
        deviations.plot([], [], color="0.4", marker=mark, linestyle="", label=layout)
    every = [row[name] / 1000 for link in figures["links"] for row in link["rows"] for name in TIMES]
    ends, tolerance = [min(every), max(every)], figures["tolerance"]
    times.plot(ends, ends, color="0.6", linewidth=1)
    worst = max(abs(row["deviation"]) for link in figures["links"] for row in link["rows"])
    limit = 100 * max(1.5 * tolerance, 1.1 * worst)
    low, high = ([end * share for end in ends] for share in (1 - tolerance, 1 + tolerance))
    times.fill_between(ends, low, high, color="0.92")
    deviations.axhspan(-100 * tolerance, 100 * tolerance, color="0.92")
    deviations.axhline(0, color="0.6", linewidth=1)
    times.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms", title="time in collectives")
    deviations.set(
        xscale="log", xlabel="measured, ms", ylabel="%", title="predicted over measured", ylim=(-limit, limit)
    )
    times.legend(title="link, one way")
    deviations.legend(ncols=2)
    drawing.suptitle("one lookup, forward and backward: four ranks on two hosts over gloo, grey within 10%")
    drawing.savefig(path, dpi=110)


def main() -> None:
    """Print or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, nargs="?", metavar="JSON", help="print figures that were written")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("JSON", "PNG"), help="draw figures that were written")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(json.loads(arguments.plot[0].read_text()), arguments.plot[1])
    elif arguments.figures:
        report(json.loads(arguments.figures.read_text()))
    else:
        parser.error("give a JSON file to print, or --plot JSON PNG")


if __name__ == "__main__":
    main()
