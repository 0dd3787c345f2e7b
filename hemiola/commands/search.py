"""Find a caching schedule for a model and a sampler.

Writes the schedule to --out, a record of everything that was tried beside it (search.json), and the schedules of the
baselines into baselines/. What was evaluated is kept in search.sqlite: a search that was interrupted, or is repeated
with other strategies or budgets, runs nothing twice.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hemiola.arguments import add_model, check_output_file, load_or_draw, positive
from hemiola_runtime.errors import RequestError

if TYPE_CHECKING:
    from hemiola_export.model import Model
    from hemiola_search.judge import Judge
    from hemiola_search.perceptual import Perception
    from hemiola_search.problem import Problem
    from hemiola_search.tasks import Subjects

FID_FEATURES = 2048  # of Inception: no more images than these give no covariance of full rank
IMAGES = {"quick": (10, 20), "thorough": (20, 200)}  # of the search, and held out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    add_model(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="FILE", help="the schedule, a JSON file")
    what.add_argument(
        "--probes", type=Path, metavar="FOLDER", help="write schedules with a step of every kind, to be measured"
    )
    parser.add_argument("--scheduler", help="ddim, dpm++2m, … or a diffusers class; default is the model's own")
    parser.add_argument(
        "--scheduler-option", action="append", default=[], metavar="KEY=VALUE", help="as use_karras_sigmas=True"
    )
    parser.add_argument("--steps", type=positive, help="denoising steps T; default is 50, and 20 for PixArt")
    parser.add_argument(
        "--strategy",
        action="append",
        help="which may find the schedule; may be given again. `best`, the default, is all of them: fewer_steps, "
        "uniform, procache, toca, duca, smoothcache, magcache, learning_to_cache, taylorseer, shortest_path and "
        "optimised. "
        "`published` is ProCache's released rhythm, without a search",
    )
    parser.add_argument(
        "--budget",
        action="append",
        help="17 full steps, 250ms for an image, or 2.5x faster than uncached; default is 17 full steps, and 7 for "
        "PixArt. Given again: the schedule is for the first, and the record compares strategies at all",
    )
    parser.add_argument(
        "--target", help="a quality in place of a budget, as relative_l2<=0.05 or agreement>=uncached-0.005"
    )
    parser.add_argument(
        "--costs", type=Path, action="append", default=[], metavar="BUNDLE", help="measured by `hemiola measure`"
    )
    parser.add_argument("--batch-size", type=positive, default=1, help="of the measured costs that count")
    parser.add_argument("--effort", choices=("quick", "thorough"), default="quick", help="how much is tried")
    parser.add_argument("--v-min", type=int, default=1, help="fewest cached steps after a full one (ProCache)")
    parser.add_argument("--v-max", type=int, help="most; default is the mean segment, rounded up")
    parser.add_argument(
        "--selective", choices=("tokens", "deep", "none"), default="tokens", help="what ProCache's selective steps do"
    )
    parser.add_argument("--token-ratio", type=float, default=0.15, help="share of tokens that `tokens` recomputes")
    parser.add_argument("--deep-ratio", type=float, default=0.25, help="share of blocks that are deep")
    parser.add_argument(
        "--max-order", type=int, default=2, help="of forecasts of cached steps: 0 repeats caches only; up to 3"
    )
    parser.add_argument(
        "--selector",
        choices=("value_norm", "output_norm", "attention", "cross_attention_entropy", "random"),
        default="value_norm",
        help="score by which ProCache's tokens are ranked",
    )
    parser.add_argument("--staleness-weight", type=float, default=0.0625, help="added per step a token went uncomputed")
    parser.add_argument("--spatial-bonus", type=float, default=0.6, help="extra for the best token of each square")
    parser.add_argument("--spatial-size", type=int, default=2, help="side of these squares in tokens")
    parser.add_argument(
        "--guidance-scale", type=float, help="of the trajectories; 0 for no guidance; default is 4, and 4.5 for PixArt"
    )
    parser.add_argument("--images", type=positive, help="that candidates are scored on; default is 10, thorough 20")
    parser.add_argument("--held-out", type=int, help="other images, for the figures; default is 20, thorough 200")
    parser.add_argument("--judge", type=Path, help="folder of a judge; default is MODEL/judge where it exists")
    parser.add_argument(
        "--metric",
        action="append",
        choices=("lpips", "clip_score", "fid"),
        help="of held-out images too, where they are RGB and large; may be given again. Needs hemiola[metrics]",
    )
    parser.add_argument(
        "--real-images", type=Path, metavar="FOLDER", help="that fid refers to; it wants thousands, and --held-out too"
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts to score on, one on each line; default is the judge's"
    )
    parser.add_argument(
        "--store", type=Path, metavar="FILE", help="what was evaluated; default is search.sqlite beside --out"
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="score on all machines of a Ray cluster: auto, host:port, ray://host:port or local",
    )
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    """Search."""
    from hemiola.progress import Bar
    from hemiola_search.budget import budget_from_text
    from hemiola_search.published import UNMEASURED, unmeasured_schedule
    from hemiola_search.strategies import STRATEGIES
    from hemiola_search.targets import target_from_text

    check_output_file(options.out)
    asked = dict.fromkeys(options.strategy or ["best"])
    if unknown := [name for name in asked if name not in ("best", *STRATEGIES, UNMEASURED)]:
        raise RequestError(f"unknown strategy {unknown[0]!r}; known are best, {', '.join(STRATEGIES)} and {UNMEASURED}")
    if UNMEASURED in asked and len(asked) > 1:
        raise RequestError(f"{UNMEASURED} is not searched for, and nothing is compared with it; give it alone")
    names = list(STRATEGIES) if "best" in asked else list(asked)
    target = None if options.target is None else target_from_text(options.target)
    if target is not None and options.budget:
        raise RequestError("a target makes the budget; leave one of --target and --budget out")
    budgets = [budget_from_text(text) for text in options.budget or []]
    if options.random_weights and names != [UNMEASURED] and options.probes is None:
        raise RequestError("on random weights no schedule can be judged; choose --strategy published")
    with Bar("search", unit="image step") as bar:
        bar.stage("loading")
        perception = _perception(options)
        model = load_or_draw(options.model, options.random_weights)
        problem, budgets = _problem(options, model, budgets)
        if options.probes is not None:
            return _write_probes(options.probes, model, problem)
        if UNMEASURED in names:
            return _write({options.out: unmeasured_schedule(model, problem)}, options.out)
        try:
            found = _find(options, model, problem, perception, names, budgets if target is None else [], target, bar)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(
                "interrupted; what was there before is unchanged, and the same command goes on from what was evaluated"
            ) from interrupt
    folder = options.out.parent
    baselines = {folder / "baselines" / f"{name}.json": schedule for name, schedule in found.baselines.items()}
    artifacts = {**baselines, folder / "search.json": found.record, options.out: found.schedule}
    return _write(artifacts, options.out)


def _find(
    options: argparse.Namespace,
    model: Model,
    problem: Problem,
    perception: Perception | None,
    names: list[str],
    budgets: Any,
    target: Any,
    bar: Any,
) -> Any:
    from hemiola_search.laboratory import Here, Laboratory
    from hemiola_search.search import find_schedule
    from hemiola_search.store import Store

    if "fid" in (options.metric or ()) and problem.options.num_held_out <= FID_FEATURES:
        sys.stderr.write(
            f"warning: fid of {problem.options.num_held_out} held-out images compares the schedules of this search "
            "with each other alone; it is no published figure below 10,000 or more. Raise --held-out\n"
        )
    with Store(options.store or options.out.with_name("search.sqlite")) as store:
        laboratory = Laboratory(
            model,
            problem,
            subjects=_subjects(options, problem, model),
            judge=_judge(options),
            perception=perception,
            store=store,
            workers=Here if options.ray is None else _fleet(options.ray),
            on_work=bar.advance,
            on_left=bar.expect,
            on_stage=bar.stage,
        )
        return find_schedule(laboratory, names, budgets, target)


def _fleet(address: str) -> Any:
    from functools import partial

    from hemiola_search.fleet import Fleet

    return partial(Fleet, address=address)


def _problem(options: argparse.Namespace, model: Model, budgets: Any) -> tuple[Problem, Any]:
    """State the problem with what was asked for, or else what ProCache measured this family with.

    A budget that was not asked for keeps the paper's share of the steps that were.
    """
    from hemiola_export.model import make_scheduler
    from hemiola_runtime.cost_table import read_cost_tables
    from hemiola_runtime.schedule import TokenSelector
    from hemiola_search.budget import Budget
    from hemiola_search.problem import SearchOptions
    from hemiola_search.problems import problem_for

    papers_steps, papers_budget, papers_scale = (50, 17, 4.0) if model.text is None else (20, 7, 4.5)
    steps = options.steps or papers_steps
    budgets = budgets or [Budget(max(1, round(papers_budget * steps / papers_steps)), "full")]
    num_images, num_held_out = IMAGES[options.effort]
    try:
        selector = TokenSelector(
            options.selector, options.staleness_weight, options.spatial_bonus, options.spatial_size, options.seed
        )
    except ValueError as error:
        raise RequestError(str(error)) from error
    settings = SearchOptions(
        v_min=options.v_min,
        v_max=options.v_max,
        selective=options.selective,
        token_ratio=options.token_ratio,
        deep_ratio=options.deep_ratio,
        selector=selector,
        max_order=options.max_order,
        guidance_scale=papers_scale if options.guidance_scale is None else options.guidance_scale,
        num_images=options.images or num_images,
        num_held_out=num_held_out if options.held_out is None else options.held_out,
        effort=options.effort,
        seed=options.seed,
    )
    scheduler = make_scheduler(model, options.scheduler, _options(options.scheduler_option))
    tables = [table for path in options.costs for table in read_cost_tables(path)]
    problem = problem_for(model, scheduler, steps, settings, budgets[0], tables=tables, batch_size=options.batch_size)
    return problem, budgets


def _write_probes(folder: Path, model: Model, problem: Problem) -> int:
    from hemiola_runtime.schedule import write_schedule
    from hemiola_search.probes import probe_schedules

    for name, schedule in probe_schedules(model, problem).items():
        write_schedule(schedule, folder / f"{name}.json")
        sys.stdout.write(f"wrote {folder / name}.json: {schedule.summary}\n")
    return 0


def _write(artifacts: dict[Path, Any], out: Path) -> int:
    """Write all artifacts, and say what the schedule is."""
    from hemiola_runtime.artifacts import write_together
    from hemiola_runtime.codec import as_json

    write_together({path: as_json(artifact) for path, artifact in artifacts.items()})
    schedule = artifacts[out]
    figures = ", ".join(f"{name} {value:.4g}" for name, value in schedule.measured.items())
    found_by = f"{schedule.found_by.strategy} {schedule.found_by.arguments.get('name', '')}".rstrip()
    sys.stdout.write(f"{schedule.rhythm}\n{schedule.summary}, found by {found_by}\n{figures}\n")
    for path, other in artifacts.items():
        if path.parent.name == "baselines":
            sys.stdout.write(f"{path.stem}: {other.summary}, relative_l2 {other.measured['relative_l2']:.4g}\n")
    sys.stdout.write(f"wrote {out}\n")
    return 0


def _judge(options: argparse.Namespace) -> Judge | None:
    from hemiola_search.judge import Judge

    folder = _judge_folder(options)
    return None if folder is None else Judge(folder)


def _judge_folder(options: argparse.Namespace) -> Path | None:
    folder: Path = options.judge or Path(options.model) / "judge"
    return folder if options.judge is not None or folder.is_dir() else None


def _perception(options: argparse.Namespace) -> Perception | None:
    """Open what the metrics need, before a model is loaded: their weights are what is missing most often."""
    if options.metric is None and options.real_images is None:
        return None
    from hemiola_search.perceptual import Perception

    return Perception(options.metric or (), options.real_images)


def _subjects(options: argparse.Namespace, problem: Problem, model: Model) -> Subjects:
    """Return the prompts of a model that draws them."""
    from hemiola_export.prompts import read_prompts
    from hemiola_search.tasks import PROMPTS_FILE, Subjects, judged_prompts

    if model.text is None:
        if options.prompts is not None:
            raise RequestError("the model draws images of labels; leave --prompts out")
        return Subjects()
    folder = _judge_folder(options)
    has_answers = folder is not None and (options.prompts is None or (folder / PROMPTS_FILE).is_file())
    known = judged_prompts(folder) if folder is not None and has_answers else Subjects()
    if options.prompts is None:
        return known
    prompts = read_prompts(options.prompts)
    if len(prompts) < problem.options.num_images + problem.options.num_held_out:
        sys.stderr.write(
            f"warning: {options.prompts} holds {len(prompts)} prompts for {problem.options.num_images} searched and "
            f"{problem.options.num_held_out} held-out images: prompts repeat, with other noise\n"
        )
    return Subjects(tuple(prompts), known.answers)


def _options(pairs: list[str]) -> dict[str, Any]:
    parsed = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise RequestError(f"--scheduler-option takes KEY=VALUE, not {pair!r}")
        try:
            parsed[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            parsed[key] = value
    return parsed
