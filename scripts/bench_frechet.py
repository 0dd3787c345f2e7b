"""Judge many images that compiled engines draw, for each schedule of one or several bundles, and write the figures.

    python scripts/bench_frechet.py out/digits/bundle --model examples/digits --out benchmarks/digits_frechet.json

Seeds begin at 2,000,000: a search draws from 0 and holds out from 1,000,000, so no image was searched or reported on.
All schedules draw the same seeds, of all classes or of the judge's prompts in turn. The model's judge reads them:
agreement with its bootstrap interval, and the Fréchet distance to the real images whose statistics the judge holds.
That distance shrinks as images grow in number, towards the one between the distributions, so only distances of equally
many images compare. Those of five disjoint fifths are told, too: how far they lie apart is chance, and that they lie
above the distance of all images is their smaller number. What the judge saw is kept in an .npz file beside --out, under
a digest of engines, schedule and judge: a run that was interrupted goes on, one for more images draws the new ones.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hemiola_runtime.artifacts import MadeBy, sha256_of, write_bytes, write_text
from hemiola_runtime.backends import entry_of
from hemiola_runtime.bench import Machine
from hemiola_runtime.errors import HemiolaError
from hemiola_runtime.sampler import Sampler
from hemiola_search.errors import SearchError
from hemiola_search.judge import Judge
from hemiola_search.statistics import bootstrap_interval
from hemiola_search.tasks import judged_prompts

FIRST_SEED: Final = 2_000_000
FIFTHS: Final = 5
SECONDS_BETWEEN_SAVES: Final = 30.0
NOTE: Final = (
    "Fréchet distances are squared, in the feature space of the model's own judge, and are not FID. They depend on the "
    "number of images; those of fifths are of a fifth of it."
)
Read: TypeAlias = tuple[NDArray[np.int64], NDArray[np.float32]]  # labels (n,), features (n, F)


@dataclass(frozen=True, slots=True)
class Subjects:
    """What images are drawn of, `labels` or `prompts` in turn, with what the judge should read off each."""

    kind: str
    values: Sequence[Any]
    answers: Sequence[int]

    def request(self, start: int, stop: int) -> dict[str, Any]:
        """Return the arguments of a request for some of the images."""
        drawn = [self.values[i % len(self.values)] for i in range(start, stop)]
        return {self.kind: drawn, "seeds": list(range(FIRST_SEED + start, FIRST_SEED + stop))}


class Seen:
    """What a judge saw of the first images of each schedule, in a file."""

    def __init__(self, path: Path) -> None:
        """Read the file, if there is one."""
        self._path, self._saved = path, time.monotonic()
        self._arrays: dict[str, NDArray[Any]] = {}
        if path.exists():
            try:
                with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                    self._arrays = dict(arrays)
            except Exception as error:  # zipfile's, zlib's and NumPy's share no base class
                raise SearchError(f"{path} cannot be read: {error}. Remove it to draw all images again") from error

    def count(self, key: str) -> int:
        """Return how many images of a schedule were seen."""
        return len(self._arrays.get(f"{key}.read", ()))

    def first(self, key: str, count: int) -> Read:
        """Return what was seen of the first images of a schedule."""
        return self._arrays[f"{key}.read"][:count], self._arrays[f"{key}.features"][:count]

    def add(self, key: str, found: Read) -> None:
        """Append the next images of a schedule; now and then, the file is written."""
        new: dict[str, NDArray[Any]] = {f"{key}.read": found[0], f"{key}.features": found[1]}
        old = {name: self._arrays.get(name, part[:0]) for name, part in new.items()}
        self._arrays |= {name: np.concatenate([old[name], part]) for name, part in new.items()}  # both, or none
        if time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        np.savez(buffer := io.BytesIO(), allow_pickle=False, **self._arrays)
        write_bytes(buffer.getvalue(), self._path)
        self._saved = time.monotonic()


def main() -> None:
    """Draw, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="+", help="of one model; the first draws what several have")
    parser.add_argument("--model", type=Path, required=True, help="folder that holds the judge")
    parser.add_argument(
        "--schedule", action="append", help="of the bundles; may be given again; default is all of them"
    )
    parser.add_argument("--images", type=int, default=5000, help="of each schedule, 5 or more; default is %(default)s")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.images < FIFTHS:
        parser.error(f"--images is {FIFTHS} or more")
    try:
        with ExitStack() as stack:
            record = _measure([stack.enter_context(Sampler.open(bundle)) for bundle in options.bundle], options)
    except HemiolaError as error:
        sys.exit(f"bench_frechet: {error}")
    except KeyboardInterrupt:
        sys.exit("\nbench_frechet: interrupted; the same command goes on from the images that are there")
    write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", options.out)
    for name, row in record["schedules"].items():
        low, high = row["agreement_interval"]
        distance = "–" if row["frechet"] is None else f"{row['frechet']:.4g}"
        print(f"{name:24}agreement {row['agreement']:.4f} [{low:.4f}, {high:.4f}]   Fréchet {distance}")


def _measure(samplers: Sequence[Sampler], options: argparse.Namespace) -> dict[str, Any]:
    judge, seen = Judge(options.model / "judge"), Seen(options.out.with_suffix(".npz"))
    drawn_by, manifest, count = _by_schedule(samplers), samplers[0].manifest, options.images
    subjects = subjects_of(samplers[0], options.model / "judge")
    names = options.schedule or list(drawn_by)
    if unknown := [name for name in names if name not in drawn_by]:
        raise SearchError(f"no bundle has a schedule {unknown[0]!r}; there are {', '.join(drawn_by)}")
    keys = {name: _key(drawn_by[name], name, judge, subjects) for name in names}
    left = sum(max(0, count - seen.count(key)) for key in keys.values())
    with tqdm(total=left, unit="image", disable=None, dynamic_ncols=True) as bar:
        try:
            for name, key in keys.items():
                bar.set_description(name)
                sampler, at_once = drawn_by[name], drawn_by[name].manifest.max_batch_size
                for start in range(seen.count(key), count, at_once):
                    stop = min(start + at_once, count)
                    images = sampler.generate(**subjects.request(start, stop), schedule=name).images
                    seen.add(key, judge.look(images / np.float32(255)))
                    bar.update(stop - start)
        finally:
            seen.save()
    schedules: dict[str, Any] = {}
    for name, key in keys.items():
        schedule = drawn_by[name].schedules[name]
        schedules[name] = {"sampler": schedule.scheduler.label, "rhythm": schedule.rhythm, "digest": key}
        schedules[name] |= figures(judge, subjects, *seen.first(key, count))
    return {
        "what": f"{manifest.pipeline.model.name}, {manifest.precision}, {count} images of each schedule",
        "note": NOTE,
        "guidance_scale": manifest.pipeline.guidance_scale,
        "first_seed": FIRST_SEED,
        "judge": judge.digest,
        "machine": asdict(Machine.here()),
        "backend": asdict(manifest.backend),
        "made_by": asdict(MadeBy.here("numpy", "scipy", "onnxruntime", entry_of(manifest.backend.name).distribution)),
        "schedules": schedules,
    }


def _by_schedule(samplers: Sequence[Sampler]) -> dict[str, Sampler]:
    """Return who draws each schedule: the first bundle that has it.

    Raises:
        SearchError: the bundles would not draw alike.
    """
    kinds = []
    for manifest in (sampler.manifest for sampler in samplers):
        pipeline = manifest.pipeline
        kinds.append((pipeline.model.weights_sha256, manifest.precision, manifest.backend, pipeline.guidance_scale))
    if kinds.count(kinds[0]) != len(kinds):
        raise SearchError("the bundles differ in model, precision, backend or guidance: compare each by itself")
    found: dict[str, Sampler] = {}
    for sampler in samplers:
        found |= {name: sampler for name in sampler.schedules if name not in found}
    return found


def figures(judge: Judge, subjects: Subjects, read: NDArray[np.int64], features: NDArray[np.float32]) -> dict[str, Any]:
    """Return agreement and Fréchet distances; None where there are too few images for a covariance of full rank."""
    wanted = [subjects.answers[i % len(subjects.answers)] for i in range(len(read))]
    is_right = (read == np.asarray(wanted)).astype(np.float64)
    parts = (features, *np.array_split(features, FIFTHS))  # fifths in order: each has all subjects, or nearly
    whole, *fifths = [judge.frechet(part) if len(part) > part.shape[1] else None for part in parts]
    known = [value for value in fifths if value is not None]
    return {
        "num_images": len(read),
        "agreement": float(is_right.mean()),
        "agreement_interval": bootstrap_interval(is_right.tolist()),
        "frechet": whole,
        "frechet_of_fifths": fifths,
        "frechet_std_of_fifths": statistics.stdev(known) if len(known) > 1 else None,
    }


def subjects_of(sampler: Sampler, judge: Path) -> Subjects:
    """Return the classes of a bundle, or the prompts of its judge."""
    if sampler.manifest.pipeline.text is None:
        labels = range(len(sampler.manifest.pipeline.labels))
        return Subjects("labels", labels, labels)
    answers = judged_prompts(judge).answers
    return Subjects("prompts", list(answers), list(answers.values()))


def _key(sampler: Sampler, name: str, judge: Judge, subjects: Subjects) -> str:
    """Return the digest of all that decides what the judge sees."""
    manifest = sampler.manifest
    engines = {path: file.sha256 for path, file in manifest.files.items() if path.startswith("engines/")}
    steps = asdict(sampler.schedules[name]) | {"found_by": None, "measured": None}
    parts = [engines, asdict(manifest.backend), steps, judge.digest, manifest.pipeline.guidance_scale, FIRST_SEED]
    return sha256_of(json.dumps([*parts, list(subjects.values)], sort_keys=True).encode())


if __name__ == "__main__":
    main()
