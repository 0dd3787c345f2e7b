"""Measure what every forward of a bundle costs here: a table that searches count with.

It is written into the bundle, where each machine has one of its own. Forwards are launched one by one, also where a
trajectory can be captured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hemiola.arguments import check_output_file, positive

if TYPE_CHECKING:
    from hemiola_runtime.cost_table import CostTable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder from `hemiola build`")
    parser.add_argument(
        "--batch-size",
        type=positive,
        nargs="+",
        action="extend",
        metavar="N",
        help="images in one request, one number or several; default is 1 and the largest that the bundle takes",
    )
    parser.add_argument("--repeats", type=positive, default=10, help="requests of each kind that count")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the table there, and not into the bundle")


def run(options: argparse.Namespace) -> int:
    """Measure."""
    from hemiola.progress import Bar
    from hemiola_runtime.cost_table import write_cost_table
    from hemiola_runtime.measure import MeasureOptions, measure_costs

    check_output_file(options.out)
    with Bar("measure", unit="request") as bar:
        measuring = MeasureOptions(tuple(options.batch_size or ()), options.repeats)
        table = measure_costs(options.bundle, measuring, on_request=bar.advance)
    out = options.bundle / table.file if options.out is None else options.out
    write_cost_table(table, out)
    _show(table)
    sys.stdout.write(f"wrote {out}\n")
    return 0


def _show(table: CostTable) -> None:
    write = sys.stdout.write
    write(f"{table.backend.name} {table.backend.version}, {table.precision}, on {table.where}\n")
    write(
        f"{'kind':14}{'tokens':>8}{'batch':>7}{'median ms':>12}{'p10':>10}{'p90':>10}{'of full':>9}{'launches':>10}\n"
    )
    for row in table.rows:
        full = table.row("full", 0, row.batch_size)
        assert full is not None
        tokens, share = row.tokens or "–", row.median_ms / full.median_ms
        write(f"{row.kind:14}{tokens:>8}{row.batch_size:7}{row.median_ms:12.3f}{row.p10_ms:10.3f}{row.p90_ms:10.3f}")
        write(f"{share:9.1%}{row.count:10}\n")
