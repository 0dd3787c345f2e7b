from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import diffusers
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bundles import Made, make_bundle, schedule_from_rhythm
from commands import done, missing, refused
from hemiola.cli import main
from hemiola_export.model import load_model
from hemiola_runtime.bundle import open_bundle
from hemiola_runtime.cost_table import CostTable, mean_tokens, read_cost_table, read_cost_tables
from hemiola_runtime.errors import RequestError
from hemiola_runtime.machine import Machine
from hemiola_runtime.manifest import EngineSpec, Manifest, Profile, read_manifest
from hemiola_runtime.measure import MeasureOptions, measure_costs, measured_steps, measuring_schedules
from hemiola_runtime.program import lower
from hemiola_runtime.sampler import Sampler
from hemiola_runtime.schedule import FULL, Forward, Schedule, Step
from models import save_tiny_model
from strategies import Lowerable, examples, lowerables

NUM_TOKENS: Final = 16  # of the tiny models: the grid of token counts is 2, 4, 8 and 16


@pytest.fixture(scope="module")
def forecasting(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random DiT of 4 blocks with forecasts, a mask, and in each deep block another token count: 3 and 6."""
    folder = tmp_path_factory.mktemp("forecasting")
    solver = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    save_tiny_model(folder / "model", scheduler=solver, has_vae=False)
    model = load_model(str(folder / "model"))
    schedules = {"all": schedule_from_rhythm(model, solver, "FF1FM2s", num_tokens=((3, 6),))}
    return make_bundle(folder, folder / "model", schedules, max_batch_size=2)


def schedules_of(made: Made) -> tuple[Manifest, list[Schedule]]:
    bundle = open_bundle(made.bundle)
    return bundle.manifest, [bundle.schedule(name) for name in bundle.manifest.schedules]


def measured_kinds(table: CostTable, batch_size: int) -> dict[str, list[int]]:
    """Return the token counts of every kind that was measured."""
    rows = [row for row in table.rows if row.batch_size == batch_size]
    return {row.kind: [other.tokens for other in rows if other.kind == row.kind] for row in rows}


# the schedules that are run


@examples(60)
@given(parts=lowerables())
def test_schedules_that_measure_run_on_the_bundle_and_leave_nothing_out(parts: Lowerable) -> None:
    made = measuring_schedules(parts.manifest, [parts.schedule])
    longest = len(parts.schedule.steps)
    wanted = [step for step in measured_steps(parts.manifest, [parts.schedule]) if step.order + 2 <= longest]
    assert {step for schedule in made for step in schedule.steps} == {FULL, *wanted}
    kinds = {kind for kind in parts.manifest.forwards if int(kind.partition("_")[2] or 0) + 2 <= longest}
    assert {FULL.kind, *kinds} == {kind for schedule in made for kind in schedule.kinds}
    for schedule in made:
        assert schedule.scheduler == parts.schedule.scheduler
        parts.pipeline.check_schedule(schedule, set(parts.manifest.forwards))
        for size in {parts.size, *parts.pipeline.demanding_sizes}:
            lower(parts.manifest, schedule, parts.table, parts.batch_size, size)


def test_all_kinds_come_in_turn_behind_the_full_steps_that_forecasts_need(latent: Made) -> None:
    manifest, schedules = schedules_of(latent)
    # the schedules have 4 tokens, the grid adds 2, 8 and 16; all kinds come with each of them
    made = measuring_schedules(manifest, schedules)
    turns = "".join(schedule.rhythm[1:] for schedule in made)
    assert [schedule.rhythm[0] for schedule in made] == ["F"] * 4
    assert turns == ("FDSC" * 5)  # 4 schedules of 6 steps, the first of which is there for the caches
    counts = [step.tokens for schedule in made for step in schedule.steps if step.tokens is not None]
    assert counts == [4, 2, 8, 16, 4]


def test_forecasts_take_the_newest_cache_as_it_is(forecasting: Made) -> None:
    manifest, schedules = schedules_of(forecasting)
    made = measuring_schedules(manifest, schedules)
    assert {schedule.rhythm[:3] for schedule in made} == {"FFF"}  # reuse_2 looks back on three full steps
    forecasts = {step.kind: step.forecast for schedule in made for step in schedule.steps if step.order}
    assert forecasts == {"tokens_1": (1.0, 0.0), "reuse_1": (1.0, 0.0), "reuse_2": (1.0, 0.0, 0.0)}


def test_a_step_with_a_count_for_each_block_is_measured_as_the_schedule_has_it(forecasting: Made) -> None:
    steps = measured_steps(*schedules_of(forecasting))
    counts = {step.tokens: mean_tokens(step) for step in steps if step.tokens is not None}
    assert counts == {((3, 6),): 4.5, 2: 2.0, 8: 8.0, 16: 16.0}  # 4 of the grid is what 4.5 is rounded to


def _tuned(manifest: Manifest, engine: str, profiles: Sequence[Mapping[str, tuple[int, int, int]]]) -> Manifest:
    tuned = replace(manifest.engines[engine], profiles=tuple(Profile(dict(sides)) for sides in profiles))
    engines: dict[str, EngineSpec] = manifest.engines | {engine: tuned}
    return replace(manifest, engines=engines)


@pytest.mark.parametrize(
    ("profiles", "counts"),
    [
        ([{"B": (1, 1, 5), "K": (1, 4, 4)}], {2, 4}),
        ([{"B": (1, 1, 5), "K": (4, 4, 4)}], {4}),
        ([{"B": (1, 1, 5), "K": (2, 2, 2)}, {"B": (1, 1, 5), "K": (4, 8, 8)}], {2, 4, 8}),
        ([{"B": (1, 1, 1), "K": (1, 4, 16)}, {"B": (2, 5, 5), "K": (4, 4, 4)}], {4}),  # for every batch size
        ([{"B": (1, 1, 5)}], {2, 4, 8, 16}),
    ],
)
def test_token_counts_that_the_engines_were_not_built_for_are_left_out(
    latent: Made, profiles: list[dict[str, tuple[int, int, int]]], counts: set[int]
) -> None:
    manifest, schedules = schedules_of(latent)
    found = measured_steps(_tuned(manifest, "tokens", profiles), schedules)
    assert {step.tokens for step in found if step.forward is Forward.TOKENS} == counts
    assert {step.forward for step in found} == {Forward.FULL, Forward.DEEP, Forward.TOKENS, Forward.REUSE}


@examples(25)
@given(parts=lowerables(), least=st.integers(1, 4), more=st.integers(0, 12))
def test_whatever_the_profiles_are_the_schedules_fit_them(parts: Lowerable, least: int, more: int) -> None:
    assume("tokens" in parts.manifest.forwards)
    of_batch = (1, parts.manifest.max_batch_size, parts.manifest.max_batch_size)
    manifest = _tuned(parts.manifest, "tokens", [{"B": of_batch, "K": (least, least, least + more)}])
    for schedule in measuring_schedules(manifest, [parts.schedule]):
        lower(manifest, schedule, parts.table, parts.batch_size)


def test_a_bundle_of_one_step_has_nothing_but_full_to_measure(latent: Made) -> None:
    manifest, schedules = schedules_of(latent)
    first = schedules[0].uncached()
    one = replace(first, scheduler=replace(first.scheduler, timesteps=first.scheduler.timesteps[:1]), steps=(FULL,))
    (made,) = measuring_schedules(manifest, [one])
    assert made.rhythm == "F"


# what is measured


@pytest.mark.parametrize("fixture", ["latent", "segmented"])
def test_every_kind_is_measured_for_every_batch_size(fixture: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(fixture)
    told: list[None] = []
    table = measure_costs(made.bundle, MeasureOptions((5, 1, 5), repeats=2), on_request=lambda: told.append(None))
    manifest = read_manifest(made.bundle)
    assert (table.model, table.backend, table.precision) == (manifest.pipeline.model, manifest.backend, "fp32")
    assert (table.deep_start, table.selector) == (manifest.pipeline.deep_start, manifest.pipeline.selector)
    assert (table.machine, table.gpu, table.num_steps) == (Machine.here(), None, 6)
    assert table.batch_sizes == (1, 5)
    for batch_size in (1, 5):
        assert measured_kinds(table, batch_size) == {
            "conditioning": [0],
            "full": [0],
            "deep": [0],
            "tokens": [2, 4, 8, 16],
            "reuse": [0],
            "vae_decoder": [0],
        }
    assert len(told) == 3 * 2 * 4  # rounds, one of which does not count, batch sizes, schedules
    launches = {row.kind: row.count for row in table.rows if row.batch_size == 1 and row.kind != "tokens"}
    # 4 schedules; each begins with a full step, and all 4 kinds come 5 times in what is left; twice
    assert launches == {"conditioning": 8, "full": 2 * 9, "deep": 10, "reuse": 10, "vae_decoder": 8}
    assert {row.tokens: row.count for row in table.rows if (row.kind, row.batch_size) == ("tokens", 5)} == {
        2: 2,
        4: 4,
        8: 2,
        16: 2,
    }


def test_forecasts_masks_and_counts_by_block_are_measured(forecasting: Made) -> None:
    table = measure_costs(forecasting.bundle, MeasureOptions(repeats=1))
    assert table.batch_sizes == (1, 2)  # one image, and as many as the bundle takes
    assert measured_kinds(table, 2) == {
        "conditioning": [0],
        "full": [0],
        "masked": [0],
        "tokens_1": [2, 4, 8, 16],
        "reuse_1": [0],
        "reuse_2": [0],
    }
    assert (table.mask, table.has_block_counts) == (read_manifest(forecasting.bundle).pipeline.mask, True)
    steps = open_bundle(forecasting.bundle).schedule("all").steps
    assert table.trajectory_ms(steps, 1) is not None


def test_what_is_measured_is_what_the_report_of_each_request_tells(
    latent: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"conditioning": 3.0, "full": 10.0, "deep": 5.0, "reuse": 1.0, "vae_decoder": 20.0}
    drawn: Counter[str] = Counter()
    generate = Sampler.generate

    def timed(sampler: Sampler, **arguments: object) -> object:
        result = generate(sampler, **arguments)  # type: ignore[arg-type]
        steps = sampler.schedules[str(arguments["schedule"])].steps
        drawn[result.report.schedule] += 1
        step_ms = tuple(times.get(step.kind, 1.0 + mean_tokens(step) / 16) for step in steps)
        # the first round, which does not count, takes a hundred times as long as the others
        slow = 100.0 if drawn[result.report.schedule] == 1 else 1.0
        report = replace(result.report, step_ms=tuple(slow * ms for ms in step_ms), engine_ms=times)
        return replace(result, report=report)

    monkeypatch.setattr(Sampler, "generate", timed)
    table = measure_costs(latent.bundle, MeasureOptions((1,), repeats=3))
    expected = times | {f"tokens {k}": 1 + k / NUM_TOKENS for k in (2, 4, 8, 16)}
    found = {f"{row.kind} {row.tokens}".removesuffix(" 0"): row for row in table.rows}
    assert {name: row.median_ms for name, row in found.items()} == expected
    assert all(row.p10_ms == row.median_ms == row.p90_ms for row in found.values())
    assert table.step_ms(Step(Forward.TOKENS, 12), 1) == 1.75


@pytest.mark.parametrize("sizes", [(6,), (1, 6), (0, 1)])
def test_batch_sizes_that_the_bundle_does_not_take_are_refused_before_anything_runs(
    latent: Made, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hemiola_runtime.measure.Sampler", None)
    with pytest.raises(RequestError, match="the bundle takes 1 to 5 images in one request"):
        measure_costs(latent.bundle, MeasureOptions(sizes))


# the command


@pytest.fixture
def bundle(latent: Made, tmp_path: Path) -> Path:
    """A copy of a bundle, to be written into."""
    return Path(shutil.copytree(latent.bundle, tmp_path / "bundle"))


def test_measure_writes_a_table_into_the_bundle_which_stays_what_it_was(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(bundle)
    said = done(capsys, "measure", bundle, "--repeats", 1)
    (table,) = read_cost_tables(bundle)
    assert table.batch_sizes == (1, 5)
    first, heads, *shown, last = said.splitlines()
    assert first == f"onnxruntime {manifest.backend.version}, fp32, on {table.where}"
    assert heads.split() == ["kind", "tokens", "batch", "median", "ms", "p10", "p90", "of", "full", "launches"]
    assert [line.split()[0] for line in shown] == [row.kind for row in table.rows]
    assert [line.split()[-2] for line in shown if line.startswith("full")] == ["100.0%"] * 2
    assert last == f"wrote {bundle / table.file}"
    assert read_manifest(bundle) == manifest
    open_bundle(bundle)


def test_measuring_again_replaces_the_table_of_the_machine(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done(capsys, "measure", bundle, "--repeats", 1)
    done(capsys, "measure", bundle, "--repeats", 1, "--batch-size", 2, 3, "--batch-size", 2)
    (table,) = read_cost_tables(bundle)
    assert table.batch_sizes == (2, 3)


def test_measure_writes_to_another_place_on_request(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "costs.json"
    done(capsys, "measure", bundle, "--repeats", 1, "--batch-size", 1, "--out", out)
    assert read_cost_table(out).batch_sizes == (1,)
    assert not (bundle / "costs").exists()


def test_inspect_tells_where_a_bundle_was_measured(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "costs on" not in done(capsys, "inspect", bundle)
    done(capsys, "measure", bundle, "--repeats", 1)
    (table,) = read_cost_tables(bundle)
    said = done(capsys, "inspect", bundle)
    version = table.made_by.versions["onnxruntime"]
    parts = [f"  costs on {table.where} (python ", f", onnxruntime {version}): 18 rows, batch sizes 1, 5; {table.file}"]
    assert missing(parts, said) == []


def test_inspect_refuses_a_bundle_with_a_damaged_table_by_its_name(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle / "costs").mkdir()
    (bundle / "costs" / "0123456789ab.json").write_text('{"schema": 2}')
    message = refused(capsys, "inspect", bundle)
    assert missing(["0123456789ab.json.schema: expected one of 1, found 2", "`hemiola measure BUNDLE`"], message) == []


def test_a_damaged_table_keeps_nobody_from_drawing_or_measuring(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done(capsys, "measure", bundle, "--repeats", 1, "--batch-size", 1)
    (file,) = (bundle / "costs").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with Sampler.open(bundle) as opened:
        assert opened.generate(labels=[0]).report.rhythm == "FCSDCS"
    done(capsys, "measure", bundle, "--repeats", 1, "--batch-size", 1)
    assert read_cost_table(file).batch_sizes == (1,)


def test_measure_refuses_what_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "measure", tmp_path)
    assert missing([f"cannot read {tmp_path / 'manifest.json'}", "`hemiola build` writes bundles"], message) == []


def test_measure_refuses_a_damaged_bundle(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "engines" / "full.onnx").write_bytes(b"nothing")
    message = refused(capsys, "measure", bundle)
    assert missing(["full.onnx of the bundle", "truncated or was replaced"], message) == []


def test_measure_refuses_a_batch_size_that_the_bundle_does_not_take(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "measure", bundle, "--batch-size", 6)
    assert missing(["takes 1 to 5 images in one request", "--max-batch-size 6"], message) == []
    assert not (bundle / "costs").exists()


def test_measure_refuses_an_output_that_is_a_folder_before_it_measures(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hemiola_runtime.measure.Sampler", None)
    message = refused(capsys, "measure", bundle, "--out", tmp_path)
    assert f"{tmp_path} is a folder; name a file in it" in message


@pytest.mark.parametrize("arguments", [["--batch-size", "0"], ["--batch-size"], ["--repeats", "many"]])
def test_wrong_usage_is_told_as_such(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["measure", "bundle", *arguments])
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_bundle_that_cannot_be_written_into_is_told_with_the_path(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle / "costs").write_text("a file, where the folder would be")
    message = refused(capsys, "measure", bundle, "--repeats", 1, "--batch-size", 1)
    assert str(bundle / "costs") in message
