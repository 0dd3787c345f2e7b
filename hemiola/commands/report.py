"""Draw, measure and compare: one self-contained HTML page from a bundle and the record of its search.

Beside the page go its numbers (.json) and a picture of cached beside uncached images (.png).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hemiola.arguments import check_output_file, positive

if TYPE_CHECKING:
    from hemiola_runtime.pipeline import Pipeline
    from hemiola_search.record import SearchRecord


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder from `hemiola build`")
    parser.add_argument("--search", type=Path, required=True, metavar="FILE", help="search.json of `hemiola search`")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html")
    parser.add_argument("--images", type=positive, default=10, help="images side by side")
    parser.add_argument("--batch-size", type=positive, default=4, help="of the measurement")
    parser.add_argument("--repeats", type=positive, default=10, help="requests of each schedule that count")
    parser.add_argument("--seed", type=int, default=0, help="of the images")


def run(options: argparse.Namespace) -> int:
    """Report."""
    import numpy as np

    from hemiola.pictures import as_png, grid_of, row_of
    from hemiola.progress import Bar
    from hemiola_runtime.artifacts import write_together
    from hemiola_runtime.bench import Machine, measure
    from hemiola_runtime.graph_set import UNCACHED
    from hemiola_runtime.sampler import Sampler
    from hemiola_search.comparison import findings_of
    from hemiola_search.record import read_record
    from hemiola_search.report import ReportInput, chosen_schedule, difference_image, keys_of, render_report

    check_output_file(options.out, ".html")
    record = read_record(options.search)
    with Sampler.open(options.bundle, cuda_graphs=False) as sampler:  # launch by launch, to time each engine
        manifest, schedules = sampler.manifest, sampler.schedules
        found = chosen_schedule(record, manifest, schedules)  # refuse a wrong record before minutes are spent on it
        has_guidance = manifest.pipeline.guidance != "none"
        batch_size = min(options.batch_size, manifest.max_batch_size)
        images = {}
        with Bar("report", total=len(schedules) * (options.repeats + 2), unit="request") as bar:
            for name in schedules:
                bar.stage(f"images of {name}")
                parts = [
                    sampler.generate(
                        **_subjects(manifest.pipeline, record, range(start, min(start + batch_size, options.images))),
                        seeds=options.seed + start,
                        guidance_scale=record.guidance_scale if has_guidance else None,
                        schedule=name,
                    ).images
                    for start in range(0, options.images, batch_size)
                ]
                images[name] = np.concatenate(parts)
                bar.advance()
            bar.stage("measurement")
            measured = measure(
                sampler,
                list(schedules),
                against=UNCACHED,
                batch_size=batch_size,
                repeats=options.repeats,
                on_request=bar.advance,
            )
        differences = {
            name: difference_image(drawn, images[UNCACHED]) for name, drawn in images.items() if name != UNCACHED
        }
        machine = Machine.here()
        page = render_report(
            ReportInput(
                record=record,
                manifest=manifest,
                schedules=schedules,
                measured=measured,
                batch_size=batch_size,
                machine=machine,
                pictures={name: as_png(row_of(drawn)) for name, drawn in images.items()},
                differences={name: as_png(row_of(drawn)) for name, drawn in differences.items()},
                prompts=_subjects(manifest.pipeline, record, range(options.images)).get("prompts", ()),
            )
        )
    grid = options.out.with_suffix(".png")
    numbers = {
        "machine": asdict(machine),
        "backend": asdict(manifest.backend),
        "batch_size": batch_size,
        "repeats": options.repeats,
        "measured": {name: asdict(row) for name, row in measured.items()},
        "chosen": found,
        "keys": keys_of(schedules),  # by which the points of the search know the schedules that were measured
        "findings": {budget: findings_of(record, budget) for budget in record.limits},
        "search": asdict(record),
    }
    write_together(
        {
            grid: as_png(grid_of([images[UNCACHED], images[found]])),
            options.out.with_suffix(".json"): (json.dumps(numbers, indent=1) + "\n").encode(),
            options.out: page.encode(),
        }
    )
    sys.stdout.write(f"{found} is {measured[found].speedup:.2f}× faster than uncached\n")
    sys.stdout.write(f"wrote {options.out}, {options.out.with_suffix('.json').name} and {grid.name}\n")
    return 0


def _subjects(pipeline: Pipeline, record: SearchRecord, places: range) -> dict[str, Any]:
    """Return what is drawn at some places of the report's rows: classes in turn, or prompts of the search in turn."""
    if pipeline.text is None:
        return {"labels": [i % len(pipeline.labels) for i in places]}
    from hemiola_runtime.bench import PROMPT

    prompts = record.prompts or (PROMPT,)
    return {"prompts": [prompts[i % len(prompts)] for i in places]}
