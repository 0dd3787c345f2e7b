"""Draw images with a bundle."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hemiola.arguments import check_output_file, positive

if TYPE_CHECKING:
    from hemiola_runtime.report import TextReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder from `hemiola build`")
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--label", action="append", help="number or name of a class; may be given again")
    subject.add_argument("--prompt", action="append", help="what to draw; may be given again")
    parser.add_argument(
        "--negative-prompt",
        action="append",
        help="what guidance leads away from: one for all, or given again for each; default is the empty prompt",
    )
    parser.add_argument("--height", type=positive, help="of the pictures in pixels; default is the bundle's")
    parser.add_argument("--width", type=positive, help="likewise")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the others count up")
    parser.add_argument(
        "--guidance-scale", type=float, help="default is what the bundle's first schedule was searched with"
    )
    parser.add_argument("--schedule", help="name of one of the bundle's, or a schedule file; default is its first")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="several images become a row")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write what ran, and how long it took")
    parser.add_argument("--threads", type=positive, help="CPU threads of one engine")


def run(options: argparse.Namespace) -> int:
    """Draw."""
    from hemiola.pictures import as_png, enlargement, row_of
    from hemiola.progress import Bar
    from hemiola_runtime.artifacts import write_together
    from hemiola_runtime.sampler import Sampler

    check_output_file(options.out, ".png")
    check_output_file(options.report)
    labels = options.label and [int(text) if re.fullmatch(r"-?[0-9]+", text) else text for text in options.label]
    negative = options.negative_prompt
    with Sampler.open(options.bundle, schedule=options.schedule, num_threads=options.threads) as sampler:
        steps = len(sampler.schedules[sampler.default_schedule].steps)
        with Bar("run", total=steps, unit="step") as bar:
            result = None
            steps_done = sampler.stream(
                labels=labels,
                prompts=options.prompt,
                negative_prompts=negative[0] if negative and len(negative) == 1 else negative,
                seeds=options.seed,
                guidance_scale=options.guidance_scale,
                height=options.height,
                width=options.width,
            )
            for progress in steps_done:
                bar.stage(progress.forward)
                bar.advance()
                result = progress.result
    assert result is not None
    written = {options.out: as_png(row_of(result.images))}
    if options.report is not None:
        written[options.report] = (json.dumps(asdict(result.report), indent=1) + "\n").encode()
    write_together(written)
    report = result.report
    if report.text is not None:
        _warn_of_prompts(report.text)
    height, width = result.images.shape[1:3]
    factor = enlargement(height, width)
    size = f"{height}×{width} pixels" + (f", each drawn {factor} times as large" if factor > 1 else "")
    sys.stdout.write(f"{report.schedule}: {report.rhythm}\n{report.wall_ms:.0f} ms; wrote {options.out}: {size}\n")
    return 0


def _warn_of_prompts(report: TextReport) -> None:
    for prompt, num_tokens in report.truncated.items():
        sys.stderr.write(f"warning: the prompt {prompt[:60]!r} has {num_tokens} tokens; its end was not read\n")
    for prompt, pieces in report.unknown.items():
        said = ", ".join(map(repr, pieces))
        sys.stderr.write(f"warning: of the prompt {prompt[:60]!r} the text encoder does not know {said}\n")
