"""Export a model as the ONNX graphs that some schedules need.

All graphs share one weight file. The first schedule is the one that a bundle runs by default; the uncached schedule is
added as `full`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hemiola_runtime.errors import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("model", metavar="MODEL", help="diffusers folder or hub id")
    parser.add_argument(
        "--schedule",
        action="append",
        required=True,
        metavar="[NAME=]FILE",
        help="from `hemiola search`; may be given again. NAME is the strategy that found it unless given",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="graphs, replaced as a whole")


def run(options: argparse.Namespace) -> int:
    """Export."""
    from hemiola.progress import Bar
    from hemiola_export.export import export_pipeline
    from hemiola_export.model import load_model
    from hemiola_runtime.schedule import Schedule, read_schedule

    schedules: dict[str, Schedule] = {}
    for argument in options.schedule:
        name, separator, file = argument.partition("=")
        is_named = bool(separator) and not Path(argument).is_file()
        schedule = read_schedule(Path(file if is_named else argument))
        name = name if is_named else schedule.found_by.strategy
        if name in schedules:
            raise RequestError(f"two schedules are called {name!r}; name them, as --schedule {name}-2={file}")
        schedules[name] = schedule
    with Bar("export", unit="part") as bar:
        bar.stage("loading")
        model = load_model(options.model)

        def progress(part: str) -> None:
            bar.stage(part)
            bar.advance()

        graphs = export_pipeline(model, schedules, options.out, progress=progress)
    sys.stdout.write(f"wrote {options.out}: {', '.join(graphs.graphs)}; schedules {', '.join(graphs.schedules)}\n")
    return 0
