"""Draw images with a bundle."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

from hemiola.arguments import check_output_file, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder from `hemiola build`")
    parser.add_argument("--label", action="append", required=True, help="number or name; may be given again")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the others count up")
    parser.add_argument("--guidance-scale", type=float, help="default is 4 where the bundle has guidance")
    parser.add_argument("--schedule", help="name of one of the bundle's, or a schedule file; default is its first")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="several images become a row")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write what ran, and how long it took")
    parser.add_argument("--threads", type=positive, help="CPU threads of one engine")


def run(options: argparse.Namespace) -> int:
    """Draw."""
    from hemiola.pictures import as_png, row_of
    from hemiola.progress import Bar
    from hemiola_runtime.artifacts import write_together
    from hemiola_runtime.sampler import Sampler

    check_output_file(options.out)
    check_output_file(options.report)
    labels = [int(label) if re.fullmatch(r"-?[0-9]+", label) else label for label in options.label]
    with Sampler.open(options.bundle, schedule=options.schedule, num_threads=options.threads) as sampler:
        steps = len(sampler.schedules[sampler.default_schedule].steps)
        with Bar("run", total=steps, unit="step") as bar:
            result = None
            for progress in sampler.stream(labels=labels, seeds=options.seed, guidance_scale=options.guidance_scale):
                bar.stage(progress.forward)
                bar.advance()
                result = progress.result
    assert result is not None
    written = {options.out: as_png(row_of(result.images))}
    if options.report is not None:
        written[options.report] = (json.dumps(asdict(result.report), indent=1) + "\n").encode()
    write_together(written)
    report = result.report
    sys.stdout.write(f"{report.schedule}: {report.rhythm}\n{report.wall_ms:.0f} ms; wrote {options.out}\n")
    return 0
