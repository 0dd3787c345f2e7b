"""Find a caching schedule for a model and a sampler.

Writes the schedule to --out, a record of everything that was tried beside it (search.json), and the schedules of the
baselines, fewer steps and FORA's uniform period, into baselines/.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

from hemiola.arguments import add_model, check_output_file, load_or_draw, positive
from hemiola_runtime.errors import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    add_model(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the schedule, a JSON file")
    parser.add_argument("--scheduler", help="ddim, dpm++2m, … or a diffusers class; default is the model's own")
    parser.add_argument(
        "--scheduler-option", action="append", default=[], metavar="KEY=VALUE", help="as use_karras_sigmas=True"
    )
    parser.add_argument("--steps", type=positive, help="denoising steps T; default is 50, and 20 for PixArt")
    parser.add_argument("--strategy", default="procache", help="procache, uniform, fewer_steps or published")
    parser.add_argument("--budget", type=positive, help="full steps among the T; default is 17, and 7 for PixArt")
    parser.add_argument("--v-min", type=int, default=1, help="fewest cached steps after a full one (ProCache)")
    parser.add_argument("--v-max", type=int, help="most; default is the mean segment, rounded up")
    parser.add_argument(
        "--selective", choices=("tokens", "deep", "none"), default="tokens", help="what ProCache's selective steps do"
    )
    parser.add_argument("--token-ratio", type=float, default=0.15, help="share of tokens that `tokens` recomputes")
    parser.add_argument("--deep-ratio", type=float, default=0.25, help="share of blocks that are deep")
    parser.add_argument(
        "--selector",
        choices=("value_norm", "output_norm", "attention", "cross_attention_entropy", "random"),
        default="value_norm",
        help="score by which tokens are ranked",
    )
    parser.add_argument("--staleness-weight", type=float, default=0.0625, help="added per step a token went uncomputed")
    parser.add_argument("--spatial-bonus", type=float, default=0.6, help="extra for the best token of each square")
    parser.add_argument("--spatial-size", type=int, default=2, help="side of these squares in tokens")
    parser.add_argument(
        "--guidance-scale", type=float, help="of the trajectories; 0 for no guidance; default is 4, and 4.5 for PixArt"
    )
    parser.add_argument("--images", type=positive, default=20, help="images that candidates are scored on")
    parser.add_argument("--held-out", type=int, default=60, help="other images, for the figures of the result")
    parser.add_argument("--judge", type=Path, help="folder of a judge; default is MODEL/judge where it exists")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts to score on, one on each line; default is the judge's"
    )
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    """Search."""
    from hemiola.progress import Bar
    from hemiola_export.model import make_scheduler
    from hemiola_runtime.schedule import TokenSelector
    from hemiola_search.judge import Judge
    from hemiola_search.problem import SearchOptions
    from hemiola_search.search import find_schedule, problem_for, unmeasured_schedule
    from hemiola_search.strategies import STRATEGIES

    check_output_file(options.out)
    if options.strategy not in STRATEGIES:
        raise RequestError(f"unknown strategy {options.strategy!r}; known are {', '.join(STRATEGIES)}")
    if options.random_weights and options.strategy != "published":
        raise RequestError("on random weights no schedule can be judged; choose --strategy published")
    with Bar("search", unit="step") as bar:
        bar.stage("loading")
        model = load_or_draw(options.model, options.random_weights)
        steps, budget, guidance_scale = _papers_choice(options, model)
        scheduler = make_scheduler(model, options.scheduler, _options(options.scheduler_option))
        try:
            selector = TokenSelector(
                options.selector, options.staleness_weight, options.spatial_bonus, options.spatial_size, options.seed
            )
        except ValueError as error:
            raise RequestError(str(error)) from error
        settings = SearchOptions(
            budget=budget,
            v_min=options.v_min,
            v_max=options.v_max,
            selective=options.selective,
            token_ratio=options.token_ratio,
            deep_ratio=options.deep_ratio,
            selector=selector,
            guidance_scale=guidance_scale,
            num_images=options.images,
            num_held_out=options.held_out,
            seed=options.seed,
        )
        guidance: Any = "classifier_free" if guidance_scale else "none"
        problem = problem_for(model, scheduler, steps, settings, guidance)
        if options.random_weights:
            return _write({options.out: unmeasured_schedule(model, problem)}, options.out)
        found = find_schedule(
            model,
            problem,
            options.strategy,
            _judge(options, Judge),
            subjects=_subjects(options, model),
            on_step=bar.advance,
            on_stage=bar.stage,
        )
    folder = options.out.parent
    baselines = {folder / "baselines" / f"{name}.json": schedule for name, schedule in found.baselines.items()}
    artifacts = {**baselines, folder / "search.json": found.record, options.out: found.schedule}
    return _write(artifacts, options.out)


def _papers_choice(options: argparse.Namespace, model: Any) -> tuple[int, int, float]:
    """Return T, the budget and the guidance scale: what was asked for, or else what ProCache measured this family with.

    A budget that was not asked for keeps the paper's share of the steps that were.
    """
    steps, budget, scale = (50, 17, 4.0) if model.text is None else (20, 7, 4.5)
    asked = options.steps or steps
    if options.budget is not None and options.budget > asked:
        raise RequestError(f"a budget of {options.budget} full steps is more than {asked} steps have")
    share = max(1, round(budget * asked / steps))
    return asked, options.budget or share, scale if options.guidance_scale is None else options.guidance_scale


def _write(artifacts: dict[Path, Any], out: Path) -> int:
    """Write all artifacts, and say what the schedule is."""
    from hemiola_runtime.artifacts import write_together
    from hemiola_runtime.codec import as_json

    write_together({path: as_json(artifact) for path, artifact in artifacts.items()})
    schedule = artifacts[out]
    figures = ", ".join(f"{name} {value:.4g}" for name, value in schedule.measured.items())
    sys.stdout.write(f"{schedule.rhythm}\n{schedule.summary}\n{figures}\n")
    for path, other in artifacts.items():
        if path.parent.name == "baselines":
            sys.stdout.write(f"{path.stem}: {other.summary}, relative_l2 {other.measured['relative_l2']:.4g}\n")
    sys.stdout.write(f"wrote {out}\n")
    return 0


def _judge(options: argparse.Namespace, judge: type[Any]) -> Any:
    folder = _judge_folder(options)
    return None if folder is None else judge(folder)


def _judge_folder(options: argparse.Namespace) -> Path | None:
    folder: Path = options.judge or Path(options.model) / "judge"
    return folder if options.judge is not None or folder.is_dir() else None


def _subjects(options: argparse.Namespace, model: Any) -> Any:
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
    if len(prompts) < options.images + options.held_out:
        sys.stderr.write(
            f"warning: {options.prompts} holds {len(prompts)} prompts for {options.images} searched and "
            f"{options.held_out} held-out images: prompts repeat, with other noise\n"
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
