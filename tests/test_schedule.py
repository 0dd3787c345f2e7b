from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.codec import encode
from hemiola_runtime.errors import ScheduleError
from hemiola_runtime.schedule import (
    DEEP,
    FULL,
    KINDS,
    MASKED,
    MAX_STEPS,
    REUSE,
    Forward,
    FoundBy,
    ModelIdentity,
    Schedule,
    SchedulerIdentity,
    Step,
    TokenSelector,
    read_schedule,
    tokens,
    write_schedule,
)
from strategies import examples, json_values, mutated, schedules

GOLDEN: Final = Path(__file__).parent / "golden" / "schedule.json"
GOLDEN_FORECASTS: Final = GOLDEN.with_name("forecasts.json")
LINE: Final = (2.0, -1.0)
CURVE: Final = (3.0, -3.0, 1.0)
BY_SYMBOL: Final = {
    "F": FULL,
    "D": DEEP,
    "M": MASKED,
    "S": tokens(4),
    "C": REUSE,
    "1": replace(REUSE, forecast=LINE),
    "2": replace(REUSE, forecast=CURVE),
}
MASK: Final = (".x.x", "xx..")
SELECTOR: Final = TokenSelector("value_norm", 0.25, 0.6, 2, 0)


def schedule_of(rhythm: str) -> Schedule:
    """Make a schedule of DDIM that has this rhythm."""
    count = len(rhythm)
    return Schedule(
        schema=2,
        model=ModelIdentity("dit", "digits", "ab" * 32, (4, 8, 8)),
        scheduler=SchedulerIdentity("DDIMScheduler", {"clip_sample": False}, count, tuple(map(float, range(count)))),
        guidance="classifier_free",
        deep_start=2 if set(rhythm) & {"D", "S"} else None,
        selector=SELECTOR if "S" in rhythm else None,
        mask=MASK if "M" in rhythm else None,
        steps=tuple(BY_SYMBOL[letter] for letter in rhythm),
        found_by=FoundBy("procache", {"budget": 3}, 7, MadeBy("hemiola search", {"hemiola": "0.1.0"}, None)),
        measured={"relative_l2": 0.01},
    )


def write_json_text(data: Any, folder: Path) -> Path:
    path = folder / "schedule.json"
    path.write_text(json.dumps(data))
    return path


@examples(25)
@given(schedule=schedules())
def test_a_written_schedule_reads_back_equal(schedule: Schedule, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("schedule") / "schedule.json"
    write_schedule(schedule, path)
    again = read_schedule(path)
    assert again == schedule
    assert again.scheduler.digest == schedule.scheduler.digest


def test_the_golden_schedule_keeps_loading() -> None:
    schedule = read_schedule(GOLDEN)
    assert schedule.rhythm == "FCSFCDFF"
    assert schedule.steps[2] == tokens(4)
    assert schedule.deep_start == 3
    assert schedule.selector == SELECTOR
    assert schedule.model.latent_shape == (4, 8, 8)
    assert schedule.scheduler.label == "DDIM-8"
    assert schedule.found_by.arguments == {"budget": 4, "growth": 1.5, "kinds": ["reuse", "tokens"]}
    assert schedule.measured == {"relative_l2": 0.0123, "tera_flops_per_image": 0.0045}


def test_the_golden_schedule_with_forecasts_keeps_loading() -> None:
    schedule = read_schedule(GOLDEN_FORECASTS)
    assert schedule.rhythm == "FF1SMF2D"
    assert schedule.steps[2] == Step(Forward.REUSE, None, (2.0, -1.0))
    assert schedule.steps[3] == tokens(((5, 16),))
    assert schedule.steps[4].kind == "masked_1"
    assert schedule.steps[6].forecast == (1.5, -0.625, 0.125)
    assert schedule.mask == (".x.x", "xx..")
    assert (schedule.order, schedule.has_block_counts) == (2, True)


@pytest.mark.parametrize("golden", [GOLDEN, GOLDEN_FORECASTS], ids=lambda path: path.name)
def test_a_golden_schedule_is_written_as_it_was_read(golden: Path, tmp_path: Path) -> None:
    write_schedule(read_schedule(golden), tmp_path / "schedule.json")
    assert json.loads((tmp_path / "schedule.json").read_text()) == json.loads(golden.read_text())


def test_a_schedule_of_an_older_schema_is_refused_by_its_number_with_the_command_that_writes_it_anew() -> None:
    with pytest.raises(ScheduleError) as caught:
        read_schedule(GOLDEN.parent / "schema_1" / "schedule.json")
    assert str(caught.value).startswith("schedule.json.schema: expected one of 2, found 1")
    assert "`hemiola search` writes valid schedules" in str(caught.value)


def test_a_missing_schedule_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"cannot read the schedule .*gone\.json: No such file"):
        read_schedule(tmp_path / "gone.json")


def test_a_folder_is_no_schedule(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="cannot read the schedule"):
        read_schedule(tmp_path)


REFUSED: list[tuple[list[str | int], Any, str]] = [
    (["schema"], 3, "schedule.json.schema: expected one of 2, found 3"),
    (["schema"], True, "schedule.json.schema: expected one of 2, found true"),
    (["surprise"], 1, "schedule.json: unknown key 'surprise'"),
    (["model", "surprise"], 1, "schedule.json.model: unknown key 'surprise'"),
    (["steps", 3, "surprise"], 1, "schedule.json.steps[3]: unknown key 'surprise'"),
    (
        ["steps", 3, "forward"],
        "fast",
        "schedule.json.steps[3].forward: expected one of 'full', 'deep', 'masked', 'tokens'",
    ),
    (["steps", 2, "tokens"], 4.0, "schedule.json.steps[2].tokens: expected an integer, found 4.0"),
    (["steps", 2, "tokens"], 0, "schedule.json.steps[2]: a step of `tokens` recomputes 1 token or more, not 0"),
    (["steps", 2, "tokens"], None, "schedule.json.steps[2]: a step of `tokens` recomputes 1 token or more, not None"),
    (["steps", 1, "tokens"], 4, "schedule.json.steps[1]: `reuse` takes no token count, found 4"),
    (["steps", 0, "forward"], "reuse", "step 0 is `reuse`, but nothing is cached before the first step"),
    (["steps", 0, "forward"], "deep", "step 0 is `deep`"),
    (["steps", 0], {"forward": "tokens", "tokens": 2, "forecast": []}, "step 0 is `tokens`"),
    (["steps", 1], {"forward": "reuse", "tokens": None}, "schedule.json.steps[1]: missing key 'forecast'"),
    (["steps", 2, "tokens"], [[4, 0]], "steps[2]: a step of `tokens` recomputes 1 token or more, not ((4, 0),)"),
    (["steps", 2, "tokens"], [[]], "steps[2]: a step of `tokens` recomputes 1 token or more, not ((),)"),
    (["steps", 3, "forecast"], [1.0, 0.0], "steps[3]: `full` reads no cache, so it takes no forecast"),
    (["steps", 4, "forecast"], [1.0], "steps[4]: a forecast has 2 to 5 weights, not 1"),
    (["steps", 4, "forecast"], [1.0] * 6, "steps[4]: a forecast has 2 to 5 weights, not 6"),
    (["steps", 4, "forecast"], [0.0, 1.0], "steps[4]: the weights of a forecast are finite, and the newest one's is"),
    (["steps", 4, "forecast"], [1.0, None], "steps[4].forecast[1]: expected a finite number, found null"),
    (["steps", 1, "forecast"], [2.0, -1.0], "step 1 forecasts by 2 full steps, but only 1 come before it"),
    (["steps", 5, "forecast"], [3.0, -3.0, 1.0], "step 5 forecasts by 3 full steps, but only 2 come before it"),
    (["steps", 1, "forward"], "masked", "a mask is given exactly when a step is `masked`"),
    (["mask"], ["xxxx", "...."], "a mask is given exactly when a step is `masked`"),
    (["mask"], "xxxx", "schedule.json.mask: expected a list"),
    (["steps"], [], "0 steps for the 8 model evaluations of DDIM-8"),
    (["steps"], {}, "schedule.json.steps: expected a list"),
    (["scheduler", "timesteps"], [], "schedule.json.scheduler: 0 timesteps; a schedule has 1 to 10000"),
    (["scheduler", "timesteps", 1], None, "schedule.json.scheduler.timesteps[1]: expected a finite number, found null"),
    (["scheduler", "config"], [], "schedule.json.scheduler.config: expected an object"),
    (["scheduler", "num_inference_steps"], "8", "schedule.json.scheduler.num_inference_steps: expected an integer"),
    (["model", "latent_shape"], [4, 8], "schedule.json.model.latent_shape: expected a list of 3"),
    (["model", "latent_shape"], [4, 0, 8], "schedule.json.model: latent_shape [4, 0, 8] has an empty side"),
    (["model", "name"], None, "schedule.json.model.name: expected a string, found null"),
    (["guidance"], "strong", "schedule.json.guidance: expected one of 'classifier_free', 'none'"),
    (["deep_start"], None, "deep_start is given exactly when a step is `deep` or `tokens`"),
    (["deep_start"], -1, "deep_start is 0 or more, not -1"),
    (["selector"], None, "a selector is given exactly when a step is `tokens`"),
    (["selector", "score"], "luck", "schedule.json.selector.score: expected one of 'attention', 'value_norm'"),
    (
        ["selector", "staleness_weight"],
        -0.1,
        "schedule.json.selector: staleness_weight and spatial_bonus are 0 or",
    ),
    (["selector", "spatial_bonus"], -1, "schedule.json.selector: staleness_weight and spatial_bonus are 0 or"),
    (["selector", "spatial_size"], 0, "schedule.json.selector: spatial_size is 1 or more, not 0"),
    (["measured", "relative_l2"], "low", "schedule.json.measured.relative_l2: expected a finite number"),
    (["found_by", "made_by", "versions", "python"], 3, "schedule.json.found_by.made_by.versions.python: expected a s"),
    (["found_by", "seed"], False, "schedule.json.found_by.seed: expected an integer, found false"),
]


def _changed(path: list[str | int], value: Any) -> Any:
    data = json.loads(GOLDEN.read_text())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=[message[:70] for *_, message in REFUSED])
def test_an_invalid_schedule_is_refused_with_the_place(
    path: list[str | int], value: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ScheduleError) as caught:
        read_schedule(write_json_text(_changed(path, value), tmp_path))
    assert message in str(caught.value)
    assert "`hemiola search` writes valid schedules" in str(caught.value)


@pytest.mark.parametrize(
    "key",
    ["schema", "model", "scheduler", "guidance", "deep_start", "selector", "mask", "steps", "found_by", "measured"],
)
def test_a_missing_key_is_refused_by_name(key: str, tmp_path: Path) -> None:
    data = json.loads(GOLDEN.read_text())
    del data[key]
    with pytest.raises(ScheduleError, match=f"schedule.json: missing key '{key}'"):
        read_schedule(write_json_text(data, tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"seed": 7', '"seed": 7, "seed": 8', "a key stands twice in one object"),
        ("0.0123", "NaN", "NaN is not a number that JSON knows"),
        ("876.0", "Infinity", "Infinity is not a number that JSON knows"),
        ("876.0", "1e999", "schedule.json.scheduler.timesteps[0]: expected a finite number"),
        ('"steps"', "steps", "not valid JSON"),
        ("}\n", "", "not valid JSON"),
    ],
)
def test_text_that_is_not_strict_json_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = GOLDEN.read_text()
    assert old in text
    path = tmp_path / "schedule.json"
    path.write_text(text.replace(old, new))
    with pytest.raises(ScheduleError) as caught:
        read_schedule(path)
    assert message in str(caught.value)


def _read_or_refuse(path: Path) -> Schedule | None:
    """Read a schedule; the one exception that may escape becomes None."""
    try:
        return read_schedule(path)
    except ScheduleError:
        return None


@examples(50)
@given(data=json_values())
def test_arbitrary_json_is_refused_as_a_schedule_error(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert _read_or_refuse(write_json_text(data, tmp_path_factory.mktemp("schedule"))) is None


@examples(100)
@given(content=st.binary(max_size=40))
def test_arbitrary_bytes_are_refused_as_a_schedule_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("schedule") / "schedule.json"
    path.write_bytes(content)
    assert _read_or_refuse(path) is None


@examples(150)
@given(data=st.sampled_from([GOLDEN, GOLDEN_FORECASTS]).flatmap(lambda path: mutated(json.loads(path.read_text()))))
def test_a_mutated_schedule_is_read_as_it_is_or_refused_as_a_schedule_error(
    data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    schedule = _read_or_refuse(write_json_text(data, tmp_path_factory.mktemp("schedule")))
    assert schedule is None or encode(schedule) == data


@pytest.mark.parametrize("forward", [Forward.DEEP, Forward.MASKED, Forward.REUSE, Forward.TOKENS])
def test_a_schedule_that_reads_the_cache_at_step_0_is_refused(forward: Forward) -> None:
    step = Step(forward, 4 if forward is Forward.TOKENS else None)
    schedule = schedule_of("FDS")
    with pytest.raises(ValueError, match=f"step 0 is `{forward.value}`.*Make it `full`"):
        replace(schedule, steps=(step, *schedule.steps[1:]))


def test_a_schedule_has_one_step_for_each_model_evaluation() -> None:
    schedule = schedule_of("FCF")
    with pytest.raises(ValueError, match="2 steps for the 3 model evaluations of DDIM-3"):
        replace(schedule, steps=schedule.steps[:2])


def test_a_schedule_has_no_more_than_the_most_steps() -> None:
    most = SchedulerIdentity("DDIMScheduler", {}, MAX_STEPS, (0.0,) * MAX_STEPS)
    assert len(most.timesteps) == 10_000
    with pytest.raises(ValueError, match="10001 timesteps; a schedule has 1 to 10000"):
        replace(most, timesteps=(0.0,) * (MAX_STEPS + 1))


@pytest.mark.parametrize("rhythm", ["F", "FF", "FCFC", "FD", "FSC", "FCSCFDC", "FM", "FF1FS2C"])
def test_the_rhythm_has_one_letter_for_each_step(rhythm: str) -> None:
    assert schedule_of(rhythm).rhythm == rhythm


@pytest.mark.parametrize(
    ("rhythm", "segments"),
    [
        ("F", [(1, 1)]),
        ("FFF", [(1, 3)]),
        ("FCFC", [(2, 2)]),
        ("FCCFCCFCF", [(3, 2), (2, 1), (1, 1)]),
        ("FFCCC", [(1, 1), (4, 1)]),
        ("FCSCFDCFCC", [(4, 1), (3, 2)]),  # what is not full belongs to the segment, whatever it is
        ("FCFFC", [(2, 1), (1, 1), (2, 1)]),
        ("FF1MF2", [(1, 1), (3, 1), (2, 1)]),
    ],
)
def test_segments_are_the_run_length_form_of_the_distances_between_full_steps(
    rhythm: str, segments: list[tuple[int, int]]
) -> None:
    assert schedule_of(rhythm).segments() == segments


@examples(50)
@given(schedule=schedules())
def test_segments_add_up_to_the_steps(schedule: Schedule) -> None:
    assert sum(length * count for length, count in schedule.segments()) == len(schedule.steps)
    assert sum(count for _, count in schedule.segments()) == schedule.num_full


def test_counts_and_summary_say_how_often_each_forward_occurs() -> None:
    schedule = schedule_of("FCSCCFD")
    assert schedule.counts == Counter({Forward.FULL: 2, Forward.REUSE: 3, Forward.TOKENS: 1, Forward.DEEP: 1})
    assert schedule.num_full == 2
    assert schedule.summary == "3 reuse, 2 full, 1 tokens, 1 deep"
    assert schedule_of("FF1CF2M").summary == "3 full, 1 reuse_1, 1 reuse, 1 reuse_2, 1 masked"


@pytest.mark.parametrize(
    ("step", "kind", "symbol", "order"),
    [
        (FULL, "full", "F", 0),
        (REUSE, "reuse", "C", 0),
        (replace(REUSE, forecast=LINE), "reuse_1", "1", 1),
        (replace(REUSE, forecast=(1.0,) * 5), "reuse_4", "4", 4),
        (replace(DEEP, forecast=LINE), "deep_1", "D", 1),
        (replace(MASKED, forecast=CURVE), "masked_2", "M", 2),
        (replace(tokens(3), forecast=LINE), "tokens_1", "S", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_kind_of_a_step_is_its_forward_with_the_order_of_its_forecast(
    step: Step, kind: str, symbol: str, order: int
) -> None:
    assert (step.kind, step.symbol, step.order) == (kind, symbol, order)
    assert KINDS[kind] == symbol


def test_there_is_a_kind_for_each_forward_that_reads_caches_and_each_order() -> None:
    assert len(KINDS) == 6 + 5 * 4
    assert not {"full_1", "reuse_0", "reuse_5", "reuse_", "front", "conditioning"} & set(KINDS)


@pytest.mark.parametrize(
    ("step", "counts", "largest"),
    [(REUSE, (), 0), (tokens(4), (4,), 4), (tokens(((1, 5), (3, 2))), (1, 5, 3, 2), 5)],
    ids=["none", "one", "of each block"],
)
def test_a_step_knows_its_token_counts(step: Step, counts: tuple[int, ...], largest: int) -> None:
    assert (step.counts, step.max_tokens) == (counts, largest)


def test_the_graphs_that_a_schedule_takes_are_the_kinds_of_its_steps() -> None:
    schedule = schedule_of("FF1CF21M")
    assert schedule.kinds == ("full", "reuse_1", "reuse", "reuse_2", "masked")
    assert schedule.order == 2
    assert schedule_of("FCF").order == 0


@pytest.mark.parametrize("mask", [(), ("",), ("....", "...."), ("xx", "xxx"), ("xo",), ("X",)])
def test_what_is_no_mask_is_refused(mask: tuple[str, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"is no mask: strings of x and \. as long as there are blocks, with an x some"
    ):
        replace(schedule_of("FM"), mask=mask)


@examples(25)
@given(schedule=schedules())
def test_the_uncached_schedule_is_full_at_every_step_of_the_same_sampler(schedule: Schedule) -> None:
    uncached = schedule.uncached()
    assert uncached.steps == (FULL,) * len(schedule.steps)
    assert (uncached.model, uncached.scheduler) == (schedule.model, schedule.scheduler)
    assert (uncached.deep_start, uncached.selector, uncached.mask, uncached.measured) == (None, None, None, {})
    assert uncached.found_by.strategy == "full"


@pytest.mark.parametrize(
    ("bonus", "size", "has_squares"), [(0.6, 2, True), (0.6, 1, False), (0.0, 2, False), (0.01, 3, True)]
)
def test_a_selector_has_squares_if_they_are_larger_than_a_token_and_raise_one(
    bonus: float, size: int, has_squares: bool
) -> None:
    assert replace(SELECTOR, spatial_bonus=bonus, spatial_size=size).has_squares is has_squares


def test_a_schedule_that_ranks_by_cross_attention_reads_back_equal(tmp_path: Path) -> None:
    schedule = replace(schedule_of("FSC"), selector=replace(SELECTOR, score="cross_attention_entropy"))
    write_schedule(schedule, tmp_path / "schedule.json")
    assert read_schedule(tmp_path / "schedule.json") == schedule


IDENTITY: Final = SchedulerIdentity("DDIMScheduler", {"beta_end": 0.02, "clip_sample": False}, 3, (9.0, 5.0, 1.0))


def test_the_digest_does_not_depend_on_the_order_of_the_configuration() -> None:
    turned = replace(IDENTITY, config=dict(reversed(IDENTITY.config.items())))
    assert list(turned.config) != list(IDENTITY.config)
    assert turned.digest == IDENTITY.digest


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (IDENTITY, ""),
        (replace(IDENTITY, class_name="DEISScheduler"), "DDIMScheduler against DEISScheduler"),
        (replace(IDENTITY, num_inference_steps=4), "3 steps against 4"),
        (replace(IDENTITY, config=IDENTITY.config | {"beta_end": 0.03}), "beta_end = 0.02 against 0.03"),
        (replace(IDENTITY, config=IDENTITY.config | {"new": 1}), "new = None against 1"),
        (replace(IDENTITY, timesteps=(9.0, 5.0, 2.0)), "the same configuration, but other timesteps"),
    ],
)
def test_schedulers_that_differ_have_other_digests_and_the_difference_is_said(
    other: SchedulerIdentity, difference: str
) -> None:
    assert IDENTITY.difference(other) == difference
    assert (IDENTITY.digest == other.digest) == (difference == "")


def test_the_digest_stays_what_it_was() -> None:
    # Bundles name their solver tables by it: a change orphans the tables of every bundle there is.
    text = (
        "{'class_name': 'DDIMScheduler', 'config': {'beta_end': 0.02, 'clip_sample': False}, "
        "'num_inference_steps': 3, 'timesteps': [9.0, 5.0, 1.0]}"
    )
    assert IDENTITY.digest == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize(("name", "label"), [("DDIMScheduler", "DDIM-3"), ("Custom", "Custom-3")])
def test_a_scheduler_is_called_by_its_class_and_steps(name: str, label: str) -> None:
    assert replace(IDENTITY, class_name=name).label == label
