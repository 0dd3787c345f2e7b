"""Compare a bundle with what else a user of diffusers would pick, on this machine: speed and error side by side.

    python scripts/bench_peers.py out/digits/bundle --model examples/digits --out benchmarks/digits_peers.json

The peers run diffusers' own transformer and scheduler in PyTorch: as they are, with fewer steps, with diffusers' cache
hooks (FirstBlockCache, MagCache with ratios measured here, TaylorSeer on attention and MLP), and with cache-dit where
it is installed (DBCache, alone and with TaylorSeer), each at several settings. All draw the same noise, in turn; the
error is the relative L2 of the final latents against diffusers without a cache. Guided models of labels alone. On a GPU
where PyTorch has one; --compile runs every peer through torch.compile too, with its caches installed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import diffusers
import numpy as np
import torch

from hemiola.arguments import load_or_draw, positive
from hemiola_export.architectures import ARCHITECTURES
from hemiola_export.model import Model, scheduler_from_identity
from hemiola_runtime.artifacts import MadeBy, write_text
from hemiola_runtime.backends import entry_of
from hemiola_runtime.bench import Machine, Spread, gpu_state, in_turn, ratio
from hemiola_runtime.errors import HemiolaError, RequestError
from hemiola_runtime.graph_set import UNCACHED
from hemiola_runtime.graphs import PRECISIONS
from hemiola_runtime.sampler import Sampler
from hemiola_search.quality import relative_l2
from hemiola_search.statistics import bootstrap_interval
from peers import Latents, Loop, Peer, cache_dit_peers, diffusers_peers, magnitude_ratios

FIRST_SEED: Final = 3_000_000  # no image that a search or `bench_frechet.py` draws
PLAIN: Final = Peer("diffusers", "without a cache")

Name = tuple[str, str]  # who, and how
Draw = Callable[[Sequence[int], Sequence[int]], Latents]  # of seeds and labels


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", required=True, help="that the bundle was made of: a folder, hub id or architecture")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32", help="of the peers")
    parser.add_argument("--compile", metavar="MODE", help="of torch.compile, as default or max-autotune-no-cudagraphs")
    parser.add_argument("--batch-size", type=positive, default=4)
    parser.add_argument("--repeats", type=positive, default=10, help="rounds that count")
    parser.add_argument("--images", type=positive, default=40, help="for the error")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # else a remark on every cache that is put in
    diffusers.utils.logging.set_verbosity_error()
    try:
        model = load_or_draw(options.model, options.model in ARCHITECTURES)
        with Sampler.open(options.bundle) as sampler:
            record = _measure(options, model, sampler)
    except HemiolaError as error:
        sys.exit(f"bench_peers: {error}")
    write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", options.out)
    sys.stdout.write(table(record))


def _measure(options: argparse.Namespace, model: Model, sampler: Sampler) -> dict[str, Any]:
    manifest, batch_size = sampler.manifest, options.batch_size
    if manifest.pipeline.guidance != "classifier_free" or not model.family.num_classes:
        raise RequestError("this comparison is of models of labels, searched with guidance")

    def subjects(first: int, count: int) -> tuple[list[int], list[int]]:
        numbers = range(first, first + count)
        return [FIRST_SEED + i for i in numbers], [i % model.family.num_classes for i in numbers]

    def timed(draw: Draw) -> float:
        start = time.perf_counter()
        draw(*subjects(0, batch_size))
        return 1000 * (time.perf_counter() - start) / float(batch_size)

    draws = _draws(options, model, sampler, subjects(0, batch_size))
    given = in_turn({name: partial(timed, draw) for name, draw in draws.items()}, options.repeats)
    starts = range(0, options.images, batch_size)
    latents = {
        name: np.concatenate([draw(*subjects(start, batch_size)) for start in starts]) for name, draw in draws.items()
    }
    libraries = ("torch", "diffusers", "cache-dit", entry_of(manifest.backend.name).distribution)
    return {
        "what": f"{manifest.pipeline.model.name}, {sampler.schedules[UNCACHED].scheduler.label}, batch {batch_size}",
        "guidance_scale": manifest.pipeline.guidance_scale,
        "num_images": len(starts) * batch_size,
        "precision": {"Hemiola": manifest.precision, "peers": options.precision},
        "machine": asdict(Machine.here()),
        "gpu_state": gpu_state(),
        "backend": asdict(manifest.backend),
        "made_by": asdict(MadeBy.here(*libraries)),
        "rows": [_row(name, given, latents) for name in draws],
    }


def _draws(
    options: argparse.Namespace, model: Model, sampler: Sampler, subjects: tuple[list[int], list[int]]
) -> dict[Name, Draw]:
    """Return everybody who draws; MagCache's ratios are measured on some subjects."""
    identity = sampler.schedules[UNCACHED].scheduler
    settings: dict[str, Any] = {
        "num_steps": identity.num_inference_steps,
        "guidance_scale": sampler.manifest.pipeline.guidance_scale,
        "dtype": getattr(torch, PRECISIONS[options.precision]),
    }

    def ours(schedule: str, seeds: Sequence[int], labels: Sequence[int]) -> Latents:
        return sampler.generate(seeds=seeds, labels=labels, schedule=schedule).latents

    found: dict[Name, Draw] = {("Hemiola", schedule): partial(ours, schedule) for schedule in sampler.schedules}
    ratios = magnitude_ratios(Loop(model, scheduler_from_identity(identity), PLAIN, **settings), *subjects)
    numbers = {schedule.scheduler.num_inference_steps for schedule in sampler.schedules.values()}
    fewer = [Peer("diffusers", f"{n} steps", num_steps=n) for n in sorted(numbers) if n != identity.num_inference_steps]
    for peer in (PLAIN, *fewer, *diffusers_peers(ratios), *cache_dit_peers()):
        loop = Loop(model, scheduler_from_identity(identity), peer, **settings)
        found[peer.who, peer.how] = loop.draw
        if options.compile is not None:
            compiled = Loop(model, scheduler_from_identity(identity), peer, **settings)
            compiled.transformer.compile(mode=options.compile)
            found[peer.who, f"{peer.how}, torch.compile {options.compile}"] = compiled.draw
    return found


def _row(name: Name, given: Mapping[Name, list[float]], latents: Mapping[Name, Latents]) -> dict[str, Any]:
    plain, who = (PLAIN.who, PLAIN.how), name[0]
    error = relative_l2(latents[name], latents[plain])
    return {
        "who": who,
        "how": name[1],
        "milliseconds": asdict(Spread.of(given[name])),
        "over_diffusers": ratio(given[plain], given[name]),
        "over_own_uncached": ratio(given["Hemiola", UNCACHED] if who == "Hemiola" else given[plain], given[name]),
        "relative_l2": float(error.mean()),
        "relative_l2_interval": bootstrap_interval(error.tolist()),
    }


def table(record: Mapping[str, Any]) -> str:
    """Lay out a record, the quickest first."""
    lines = ["| who | how | ms an image | over diffusers | over own uncached | relative L2 (95 %) |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for row in sorted(record["rows"], key=lambda row: float(row["milliseconds"]["median_ms"])):
        low, high = row["relative_l2_interval"]
        lines.append(
            f"| {row['who']} | {row['how']} | {row['milliseconds']['median_ms']:.1f} | {row['over_diffusers']:.2f}× "
            f"| {row['over_own_uncached']:.2f}× | {row['relative_l2']:.2g} ({low:.2g}–{high:.2g}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
