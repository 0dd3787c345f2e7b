"""Measure a DiT on this machine's GPU: a backend, or PyTorch beside it. One part a call, one JSON file a part in --out.

    python scripts/bench_gpu.py export --graphs graphs --out records           # DiT-XL/2 with random weights, bf16
    python scripts/bench_gpu.py backend tensorrt --graphs graphs --out records
    python scripts/bench_gpu.py forwards --out records                          # Hemiola's forwards in PyTorch
    python scripts/bench_gpu.py baseline eager --out records                    # diffusers' DiTPipeline; or: compile
    python scripts/bench_gpu.py table --out records                             # table.md and results.json of them all

`scripts/gpu_check.sh` runs them all within a bound of time. `backend` exports what it needs unless given --graphs, and
everything but CUDA graphs can be tried without a GPU: `backend onnxruntime --model examples/digits --precision fp32`.

Each part but `export` and `table` writes rows of one form: `who` ran, `how`, which `schedule`, at which `batch_size`;
`denoise`, milliseconds of a batch from noise to final latents; and as far as they are known `vae_ms` of decoding it,
`speedup` over all-full, `busy` and `host_ms` of a batch, `graph_bytes`, and `forwards`, milliseconds of one of each.
Times are medians over requests in turn, after a warm-up; ratios are medians of ratios of neighbours.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from hemiola.arguments import load_or_draw, positive
from hemiola_runtime.artifacts import MadeBy, write_text
from hemiola_runtime.backends import BACKENDS, cuda
from hemiola_runtime.bench import Machine, gpu_state
from hemiola_runtime.errors import HemiolaError
from hemiola_runtime.schedule import DEEP, FULL, RESIDUAL, REUSE, Forward, Schedule, TokenSelector

SELECTOR: Final = TokenSelector("value_norm", staleness_weight=0.0625, spatial_bonus=0.6, spatial_size=2, seed=0)
TOKEN_RATIO: Final = 0.15  # both as `hemiola search` has them
DEEP_RATIO: Final = 0.25
FORECAST_PERIOD: Final = 5.0  # 11 full of 50 steps: about 4× where a forecast of the residual costs next to nothing
LIBRARIES: Final = (
    *("torch", "triton", "diffusers", "onnx", "onnxruntime", "onnxruntime-gpu", "cuda-bindings"),
    *("tensorrt", "tensorrt-rtx-cu13"),
)

Body = dict[str, Any]
Save = Callable[[Body], None]

logger = logging.getLogger("bench_gpu")


def main() -> int:
    """Run one part."""
    options = _parser().parse_args()
    options.batch_size = options.batch_size or [1, 8]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        if options.part == "table":
            importlib.import_module("bench_gpu_table").run(options)
        elif options.part == "export":
            _saver(options, f"export-{options.format}")(_export(options, options.graphs, options.format))
        elif options.part == "backend":
            run = importlib.import_module("bench_gpu_backend").run
            run(options, partial(_load_model, options), partial(_export, options), _saver(options, options.name))
        else:
            name = options.what if options.part == "baseline" else options.part
            run = importlib.import_module("bench_gpu_baselines").run
            run(name, options, _load_model(options), partial(_schedules, options), _saver(options, name))
    except HemiolaError as error:
        sys.stderr.write(f"bench_gpu: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where records lie")
    shared.add_argument("--model", default="dit-xl-2", help="a known architecture, or a diffusers folder or hub id")
    shared.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="bf16")
    shared.add_argument("--steps", type=positive, default=50)
    shared.add_argument("--budget", type=positive, default=17, help="full steps of the published rhythm")
    shared.add_argument("--batch-size", type=positive, action="append", help="may be given again; default is 1 and 8")
    shared.add_argument("--repeats", type=positive, default=20, help="rounds that count, at most")
    shared.add_argument("--seconds", type=float, default=15.0, help="after which no round of a batch size begins")
    shared.add_argument("--deep", action="store_true", help="the published rhythm with `deep` steps too")
    shared.add_argument("--vae", action="store_true", help="export the VAE's decoder too")
    export = parts.add_parser("export", parents=[shared])
    export.add_argument("--graphs", type=Path, required=True, metavar="FOLDER")
    export.add_argument("--format", choices=("onnx", "torch"), default="onnx")
    backend = parts.add_parser("backend", parents=[shared])
    backend.add_argument("name", choices=tuple(BACKENDS))
    backend.add_argument("--graphs", type=Path, metavar="FOLDER", help="from `export`")
    backend.add_argument("--verify", action="store_true", help="compare every forward with PyTorch in float32")
    parts.add_parser("forwards", parents=[shared])
    baseline = parts.add_parser("baseline", parents=[shared])
    baseline.add_argument("what", choices=("eager", "compile"))
    baseline.add_argument("--mode", action="append", help="of torch.compile; may be given again")
    baseline.add_argument("--compile-seconds", type=float, default=90.0, help="after which no compilation begins")
    table = parts.add_parser("table", parents=[shared])
    table.add_argument("--records", type=Path, metavar="FOLDER", help="where records lie; default is --out")
    return parser


def _saver(options: argparse.Namespace, name: str) -> Save:
    """Return what writes a record, whole each time: a part that is stopped leaves what it has measured so far."""
    head = {
        "schema": 1,
        "part": name,
        "model": options.model,
        "precision": options.precision,
        "steps": options.steps,
        "machine": asdict(Machine.here()),
        "gpu": None if cuda.obstacle() is not None else asdict(cuda.Cuda().gpu),
        "gpu_before": gpu_state(),
        "made_by": asdict(MadeBy.here(*LIBRARIES)),
    }

    def save(body: Body) -> None:
        record = head | {"gpu_after": gpu_state()} | body
        write_text(json.dumps(record, indent=1) + "\n", options.out / f"{name}.json")

    return save


def _load_model(options: argparse.Namespace) -> Any:
    from hemiola_export.architectures import ARCHITECTURES

    return load_or_draw(options.model, options.model in ARCHITECTURES)


def _schedules(options: argparse.Namespace, model: Any) -> dict[str, Schedule]:
    """Return what is measured.

    The published rhythm with `tokens` and `deep` steps, one that forecasts the residual as schedules that are searched
    for do, and one for every kind of forward alone.
    """
    from hemiola_export.model import make_scheduler
    from hemiola_search.budget import Budget
    from hemiola_search.problem import SearchOptions
    from hemiola_search.problems import problem_for
    from hemiola_search.published import unmeasured_schedule
    from hemiola_search.strategies.taylorseer import candidate

    scheduler = make_scheduler(model, "ddim", {})
    settings = SearchOptions(
        v_min=1,
        v_max=None,
        selective="tokens",
        token_ratio=TOKEN_RATIO,
        deep_ratio=DEEP_RATIO,
        selector=SELECTOR,
        max_order=0,
        guidance_scale=4.0,
        num_images=1,
        num_held_out=2,
        effort="quick",
        seed=0,
    )
    budget = Budget(options.budget, "full")
    problem = problem_for(model, scheduler, options.steps, settings, budget)
    published = unmeasured_schedule(model, problem)
    forecast = candidate(problem, FORECAST_PERIOD, 1, Forward.RESIDUAL)
    residual = replace(RESIDUAL, forecast=(1.0, 0.0))
    (selective,) = {step for step in published.steps if step.forward is Forward.TOKENS}
    others = len(published.steps) - 1
    found = {
        "published": published,
        "forecast": replace(published, deep_start=None, selector=None, steps=forecast.steps),
        "only_reuse": replace(published, deep_start=None, selector=None, steps=(FULL, *[REUSE] * others)),
        f"only_{residual.kind}": replace(
            published, deep_start=None, selector=None, steps=(FULL, FULL, *[residual] * (others - 1))
        ),
        "only_tokens": replace(published, steps=(FULL, *[selective] * others)),
    }
    if options.deep:
        steps = tuple(DEEP if step == selective else step for step in published.steps)
        found["published_deep"] = replace(published, selector=None, steps=steps)
        found["only_deep"] = replace(published, selector=None, steps=(FULL, *[DEEP] * others))
    return found


def _export(options: argparse.Namespace, graphs: Path, graph_format: Any) -> Body:
    from hemiola_export.export import export_pipeline

    start = time.perf_counter()
    model = _load_model(options)
    loaded = time.perf_counter()
    export_pipeline(
        model if options.vae else replace(model, vae=None),
        _schedules(options, model),
        graphs,
        format=graph_format,
        precisions=[options.precision],
        has_reference=False,
        progress=logger.info,
    )
    return {
        "shape": _shape(model),
        "load_seconds": loaded - start,
        "export_seconds": time.perf_counter() - loaded,
    }


def _shape(model: Any) -> dict[str, int]:
    """Return what the roofline of one forward is made of."""
    return {
        "width": model.family.width,
        "num_blocks": len(model.family.blocks),
        "num_tokens": model.family.num_tokens,
        "num_weights": sum(weight.numel() for weight in model.transformer.parameters()),
    }


if __name__ == "__main__":
    sys.exit(main())
