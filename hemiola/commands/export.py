"""Export a model as the graphs that some schedules need.

All graphs share one weight file. The first schedule is the one that a bundle runs by default; the uncached schedule is
added as `full`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hemiola.arguments import add_model, load_or_draw, pixels, positive
from hemiola_runtime.errors import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    add_model(parser)
    parser.add_argument(
        "--schedule",
        action="append",
        required=True,
        metavar="[NAME=]FILE",
        help="from `hemiola search`; may be given again. NAME is the strategy that found it unless given",
    )
    parser.add_argument(
        "--format",
        choices=("onnx", "torch"),
        default="onnx",
        help="ONNX graphs, or PyTorch's exported programs, from which the backend inductor builds; default is onnx",
    )
    parser.add_argument(
        "--precision",
        action="append",
        choices=("fp32", "fp16", "bf16"),
        help="of matrix products, weights and caches; may be given again for graphs in several; default is fp32",
    )
    for name, what in (("min", "smallest"), ("max", "largest")):
        parser.add_argument(
            f"--{name}-size",
            type=pixels,
            metavar="HEIGHTxWIDTH",
            help=f"{what} picture in pixels that can be drawn; default is the one size that the model is made for",
        )
    parser.add_argument(
        "--tile-size", type=positive, metavar="PIXELS", help="side of what a VAE decodes at once; default is 1024"
    )
    parser.add_argument(
        "--no-reference",
        action="store_true",
        help="draw no images in PyTorch; bundles made of this export are not compared with any",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="graphs, replaced as a whole")


def run(options: argparse.Namespace) -> int:
    """Export."""
    from hemiola.progress import Bar
    from hemiola_export.export import export_pipeline
    from hemiola_export.sizes import Sizes
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
        model = load_or_draw(options.model, options.random_weights)

        def progress(part: str) -> None:
            bar.stage(part)
            bar.advance()

        graphs = export_pipeline(
            model,
            schedules,
            options.out,
            format=options.format,
            precisions=options.precision or ["fp32"],
            sizes=Sizes(options.min_size, options.max_size, options.tile_size),
            has_reference=not options.no_reference,
            progress=progress,
        )
    names = ", ".join(next(iter(graphs.precisions.values())).graphs)
    sys.stdout.write(
        f"wrote {options.out} in {', '.join(graphs.precisions)}: {names}; schedules {', '.join(graphs.schedules)}\n"
    )
    return 0
