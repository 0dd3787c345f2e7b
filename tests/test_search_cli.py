"""`hemiola search` as people call it: what it writes, what it says, what it goes on with, and what it refuses."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from commands import MadeByCommands, done, missing, refused
from hemiola.cli import main
from hemiola_export.model import load_model
from hemiola_runtime.cost_table import CostTable, read_cost_table, write_cost_table
from hemiola_runtime.schedule import read_schedule
from hemiola_search.evaluator import Evaluator
from hemiola_search.problem import Candidate, Scored
from hemiola_search.record import SearchRecord, read_record
from hemiola_search.strategies import STRATEGIES
from labs import cost_row, cost_table, load_tiny, load_tiny_text

FEW: Final = ("--steps", 6, "--images", 2, "--held-out", 2, "--v-min", 0, "--deep-ratio", 0.5)


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """Give the process its handler of SIGTERM back, which `main` takes."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search_cli") / "model"
    load_tiny(folder)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "found" / "schedule.json"


def searched(model: Path, out: Path, *arguments: object) -> list[object]:
    return ["search", model, *FEW, "--out", out, *arguments]


def record_of(out: Path) -> SearchRecord:
    return read_record(out.with_name("search.json"))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, str]]:
    """Whether images are held out, and the key of what is evaluated on them."""
    seen: list[tuple[bool, str]] = []
    score = Evaluator.score

    def recorded(self: Evaluator, candidate: Candidate) -> Scored:
        seen.append((self._follows, candidate.key))
        return score(self, candidate)

    monkeypatch.setattr(Evaluator, "score", recorded)
    return seen


# what it writes and says


def test_a_search_of_all_strategies_for_two_budgets_writes_everything_it_found(
    model: Path, out: Path, capsys: pytest.CaptureFixture[str], ran: list[tuple[bool, str]]
) -> None:
    said = done(capsys, *searched(model, out, "--budget", 2, "--budget", "2.2x"))
    schedule, record = read_schedule(out), record_of(out)
    found_by = f"found by {schedule.found_by.strategy} {schedule.found_by.arguments['name']}"
    assert said.startswith(f"{schedule.rhythm}\n{schedule.summary}, {found_by}\nrelative_l2 ")
    assert said.endswith(f"wrote {out}\n")
    assert list(record.limits) == ["2 full", "2.2×"]
    for budget in record.limits:
        tried = {point.strategy for point in record.points if point.budget == budget}
        assert tried | set(record.failures[budget]) == set(STRATEGIES)
    baselines = {path.stem: read_schedule(path) for path in (out.parent / "baselines").iterdir()}
    for name, baseline in baselines.items():
        assert f"{name}: {baseline.summary}, relative_l2 {baseline.measured['relative_l2']:.4g}\n" in said
    assert {path.name for path in out.parent.iterdir()} == {
        "schedule.json",
        "search.json",
        "search.sqlite",
        "baselines",
    }
    before = len(ran)
    assert done(capsys, *searched(model, out, "--budget", 2, "--budget", "2.2x")) == said
    assert len(ran) == before > 20
    assert record_of(out) == record


@pytest.mark.parametrize(
    ("given", "strategies"),
    [
        (["best", "uniform"], set(STRATEGIES)),
        (["uniform"], {"uniform"}),
        (["smoothcache", "magcache"], {"smoothcache", "magcache"}),
    ],
)
def test_strategies_are_those_that_were_asked_for(
    model: Path, out: Path, given: Sequence[str], strategies: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [part for name in given for part in ("--strategy", name)]
    done(capsys, *searched(model, out, "--budget", 3, *asked))
    record = record_of(out)
    tried = {point.strategy for point in record.points} | set(record.failures["3 full"])
    assert tried == {*strategies, "full", "fewer_steps", "uniform", "procache"}
    assert read_schedule(out).found_by.strategy in strategies


def test_without_a_budget_it_is_the_papers_share_of_the_steps(
    model: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done(capsys, *searched(model, out, "--strategy", "uniform"))
    assert list(record_of(out).limits) == ["2 full"]  # 17 · 6 / 50 = 2.04
    done(capsys, *searched(model, out, "--strategy", "uniform", "--steps", 12))
    assert list(record_of(out).limits) == ["4 full"]


def test_a_target_takes_the_place_of_a_budget(model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done(capsys, *searched(model, out, "--target", "relative_l2 <= 0.1", "--strategy", "shortest_path"))
    (budget,) = record_of(out).limits
    points = [point for point in record_of(out).points if point.images == "searched"]
    (chosen, *_) = [point for point in points if point.key == record_of(out).chosen]
    assert chosen.quality["relative_l2"] <= 0.1
    assert read_schedule(out).found_by.arguments["budget"] == budget


def test_options_reach_the_schedule(model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-order", 1, "--selective", "none", "--guidance-scale", 2, "--seed", 9, "--effort", "thorough"]
    done(capsys, *searched(model, out, "--budget", 3, "--strategy", "procache", "--strategy", "taylorseer", *options))
    found_by = read_schedule(out).found_by
    named = {"max_order": 1, "selective": "none", "guidance_scale": 2.0, "effort": "thorough", "num_images": 2}
    assert {name: found_by.arguments[name] for name in named} == named
    assert found_by.seed == 9
    assert not any("²" in point.rhythm or "2" in point.rhythm for point in record_of(out).points)


def test_the_store_may_lie_elsewhere(
    model: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done(capsys, *searched(model, out, "--strategy", "uniform", "--store", tmp_path / "kept.sqlite"))
    assert (tmp_path / "kept.sqlite").is_file()
    assert not out.with_name("search.sqlite").exists()


def test_probes_are_written_instead(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = done(capsys, "search", model, "--steps", 10, "--deep-ratio", 0.5, "--probes", tmp_path / "probes")
    assert sorted(path.name for path in (tmp_path / "probes").iterdir()) == ["all.json", "deep.json"]
    for path in (tmp_path / "probes").iterdir():
        assert f"wrote {path}: {read_schedule(path).summary}\n" in said


# measured costs


@pytest.fixture
def table(model: Path, tmp_path: Path) -> Path:
    """Costs of the model as somebody might have measured them."""
    rows = [cost_row("full", 10), cost_row("reuse", 1), cost_row("reuse_1", 1), cost_row("deep", 6)]
    made = replace(cost_table(rows, deep_start=1), model=load_model(str(model)).identity)
    write_cost_table(made, tmp_path / "costs.json")
    return tmp_path / "costs.json"


def test_a_search_counts_in_milliseconds_where_they_were_measured(
    model: Path, out: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 2 · 10 + 4 · 1 ms, 2 · 6 / 50 of conditioning and 4 of the decoder
    said = done(capsys, *searched(model, out, "--costs", table, "--budget", "28.24ms", "--strategy", "uniform"))
    record = record_of(out)
    assert record.limits == {"28.24 ms": pytest.approx(28.24)}
    assert (record.costs.unit, read_schedule(out).rhythm) == ("ms", "FCCFCC")
    assert record.costs.measured == "onnxruntime 1.23, fp32, A Processor, 16 cores, batch 1"
    assert read_schedule(out).measured["milliseconds"] == pytest.approx(28.24)
    assert ", milliseconds 28.24\n" in said


def test_what_was_not_measured_is_named_in_the_record(
    model: Path, out: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done(capsys, *searched(model, out, "--costs", table, "--budget", "1.5x"))
    estimated = set(record_of(out).costs.estimated)
    assert {"tokens", "masked", "reuse_2", "residual_1"} <= estimated
    assert not {"full", "reuse", "reuse_1"} & estimated


def test_a_bundle_that_was_measured_is_searched_with(
    made: MadeByCommands, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(made.bundle, tmp_path / "bundle"))
    done(capsys, "measure", bundle, "--batch-size", 1, "--batch-size", 2, "--repeats", 2)
    (path,) = (bundle / "costs").iterdir()
    table = read_cost_table(path)
    arguments = ["--costs", bundle, "--batch-size", 2, "--strategy", "procache", "--budget", 3]
    done(capsys, *searched(made.model, out, *arguments))
    full, reuse = (table.milliseconds(kind, 0, 2) for kind in ("full", "reuse"))
    conditioning = table.milliseconds("conditioning", 0, 2)
    assert full is not None
    assert reuse is not None
    assert conditioning is not None
    assert record_of(out).limits == {"3 full": pytest.approx((3 * full + 3 * reuse + conditioning) / 2)}
    assert "batch 2" in record_of(out).costs.measured
    message = refused(capsys, *searched(made.model, out, "--costs", bundle, "--batch-size", 3))
    assert missing(["at batch 1, 2, not at 3", "`hemiola measure BUNDLE --batch-size 3`"], message) == []


def _measured_elsewhere(table: CostTable) -> CostTable:
    return replace(table, machine=replace(table.machine, processor="Another Processor"))


def _of_another_model(table: CostTable) -> CostTable:
    return replace(table, model=replace(table.model, weights_sha256="f" * 64))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (_measured_elsewhere, ["A Processor, 16 cores and by onnxruntime 1.23, fp32, Another Processor", "--costs"]),
        (_of_another_model, ["the cost table was measured of model (dit, weights ffffffffffff", "`hemiola measure"]),
    ],
)
def test_costs_that_are_not_of_this_model_or_of_one_machine_are_refused(
    model: Path, out: Path, table: Path, change: Any, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    other = table.with_name("other.json")
    write_cost_table(change(read_cost_table(table)), other)
    message = refused(capsys, *searched(model, out, "--costs", table, "--costs", other))
    assert missing(parts, message) == []
    assert not out.parent.exists()


def test_a_bundle_that_was_not_measured_is_refused_with_the_command_that_does(
    made: MadeByCommands, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *searched(made.model, out, "--costs", made.bundle))
    assert f"has no cost table. Measure it with `hemiola measure {made.bundle}`" in message
    assert "no bundle: it has no" in refused(capsys, *searched(made.model, out, "--costs", out.parent.parent))


# interruptions


def test_ctrl_c_keeps_what_was_evaluated_and_the_same_command_goes_on(
    model: Path,
    out: Path,
    ran: list[tuple[bool, str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    score, after = Evaluator.score, 9

    def interrupted(self: Evaluator, candidate: Candidate) -> Scored:
        if len(ran) == after:
            raise KeyboardInterrupt
        return score(self, candidate)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "score", interrupted)
        said = refused(capsys, *searched(model, out, "--budget", 2))
        assert "the same command goes on from what was evaluated" in said
    assert [path.name for path in out.parent.iterdir()] == ["search.sqlite"]
    first = set(ran)
    assert len(first) == after
    ran.clear()
    said = done(capsys, *searched(model, out, "--budget", 2))
    again = [*ran]
    other = out.parent.parent / "uninterrupted" / "schedule.json"
    assert done(capsys, *searched(model, other, "--budget", 2)) == said.replace(str(out), str(other))
    assert len(again) == len(set(again))
    assert sorted([*again, *first]) == sorted(ran[len(again) :])
    found, expected = record_of(out), record_of(other)
    assert replace(found, made_by=expected.made_by) == expected


# refusals


REFUSED: Final[list[tuple[list[object], list[str]]]] = [
    (["--target", "psnr>=30", "--budget", 3], ["a target makes the budget; leave one of --target and --budget out"]),
    (["--target", "nice"], ["'nice' is no target", "relative_l2<=0.05"]),
    (["--target", "agreement>=0.9"], ["agreement cannot be a target", "--judge"]),
    (["--target", "psnr>=200"], ["the uncached run itself does not keep to psnr >= 200"]),
    (["--budget", "20ms"], ["needs measured costs", "`hemiola measure`", "--costs"]),
    (["--budget", "2", "--budget", "40x"], ["a budget of 40× is beyond caching"]),
    (["--strategy", "best", "--strategy", "luck"], ["unknown strategy 'luck'", "known are best, fewer_steps"]),
    (["--strategy", "published", "--strategy", "best"], ["published is not searched for", "give it alone"]),
    (["--strategy", "published"], ["no rhythm was published with 2 full of 6 steps; there are 17 full of 50"]),
    (["--strategy", "taylorseer", "--budget", 1], ["taylorseer: no such schedule keeps to 1 full"]),
    (["--strategy", "taylorseer", "--max-order", 0], ["nothing for TaylorSeer to do"]),
    (["--max-order", 5], ["max_order is 0, 1, 2 or 3, not 5"]),
    (["--prompts", "prompts.txt"], ["the model draws images of labels; leave --prompts out"]),
]


@pytest.mark.parametrize(("arguments", "parts"), REFUSED, ids=[" ".join(map(str, row[0])) for row in REFUSED])
def test_a_search_that_cannot_be_is_refused(
    model: Path, out: Path, arguments: list[object], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *searched(model, out, *arguments))
    assert missing(parts, message) == []
    assert not out.exists()


@pytest.mark.parametrize("arguments", [["--strategy", "uniform"], ["--budget", 7], ["--scheduler", "DDPMScheduler"]])
def test_a_store_that_is_none_is_refused_and_one_is_not_made_for_nothing(
    model: Path, out: Path, tmp_path: Path, arguments: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] == "--strategy":
        (tmp_path / "letter").write_text("no database " * 100)
        arguments = [*arguments, "--store", tmp_path / "letter"]
    message = refused(capsys, *searched(model, out, *arguments))
    assert ("Name another file with --store" in message) == (arguments[0] == "--strategy")
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "model", "--out", "x.json", "--probes", "y"], "not allowed with argument --out"),
        (["search", "model", "--out", "x.json", "--effort", "some"], "--effort: invalid choice: 'some'"),
        (["search", "model", "--out", "x.json", "--batch-size", "0"], "--batch-size: a whole number of 1 or more"),
        (["search", "model", "--out", "x.json", "--selective", "all"], "--selective: invalid choice: 'all'"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_ray_is_named_with_the_command_that_installs_it(
    model: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "hemiola_search.fleet", raising=False)
    message = refused(capsys, *searched(model, out, "--ray", "local"))
    assert "`hemiola search` needs ray, which is not installed. Install it with: pip install 'hemiola[ray]'" in message


def test_prompts_that_are_too_few_repeat_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_tiny_text(tmp_path / "model", num_blocks=1)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    arguments = ["--prompts", tmp_path / "prompts.txt", "--strategy", "uniform"]
    capsys.readouterr()
    assert main([str(part) for part in searched(tmp_path / "model", tmp_path / "x" / "schedule.json", *arguments)]) == 0
    said = capsys.readouterr()
    assert said.err == (
        f"warning: {tmp_path / 'prompts.txt'} holds 2 prompts for 2 searched and 2 held-out images: prompts repeat, "
        "with other noise\n"
    )
    assert sorted(read_record(tmp_path / "x" / "search.json").prompts) == ["a blue square", "a red circle"]
