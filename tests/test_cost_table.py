from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.codec import encode
from hemiola_runtime.cost_table import (
    CostRow,
    CostTable,
    mean_tokens,
    read_cost_table,
    read_cost_tables,
    stored_cost_tables,
    write_cost_table,
)
from hemiola_runtime.errors import BundleError
from hemiola_runtime.machine import Machine
from hemiola_runtime.manifest import MANIFEST_FILE, BackendSpec
from hemiola_runtime.schedule import DEEP, FULL, REUSE, Forward, ModelIdentity, Step, TokenSelector, tokens
from strategies import examples, json_values, made_by, model_identities, mutated, selectors, text

GOLDEN: Final = Path(__file__).parent / "golden" / "cost_table.json"
TABLE: Final = CostTable(
    schema=1,
    model=ModelIdentity("dit", "digits", "ab" * 32, (4, 8, 8)),
    guidance="classifier_free",
    deep_start=3,
    selector=TokenSelector("value_norm", staleness_weight=0.25, spatial_bonus=0.5, spatial_size=2, seed=0),
    mask=("x..x", ".xx."),
    has_block_counts=True,
    backend=BackendSpec("tensorrt", "10.13.3", "NVIDIA L4", ("8.9",)),
    precision="fp16",
    gpu="NVIDIA L4",
    machine=Machine("A Processor", 16, "Linux x86_64", "3.11.7"),
    num_steps=50,
    rows=(
        CostRow("conditioning", 0, 1, 2.0, 1.5, 2.5, 20),
        CostRow("full", 0, 1, 10.0, 9.5, 11.0, 200),
        CostRow("deep", 0, 1, 5.0, 4.5, 5.5, 40),
        CostRow("tokens", 2, 1, 2.0, 1.75, 2.25, 20),
        CostRow("tokens", 4, 1, 3.0, 2.75, 3.25, 20),
        CostRow("tokens", 8, 1, 4.0, 3.75, 4.25, 20),
        CostRow("reuse_2", 0, 1, 1.0, 0.75, 1.25, 40),
        CostRow("vae_decoder", 0, 1, 20.0, 19.0, 21.0, 20),
        CostRow("conditioning", 0, 8, 3.0, 2.5, 3.5, 20),
        CostRow("full", 0, 8, 70.0, 69.0, 71.0, 200),
    ),
    made_by=MadeBy("hemiola measure bundle", {"hemiola": "0.1.0"}, None),
)
BASE: Final = (CostRow("conditioning", 0, 1, 1.0, 1.0, 1.0, 1), CostRow("full", 0, 1, 1.0, 1.0, 1.0, 1))


def table_of(points: Iterable[tuple[int, float]]) -> CostTable:
    """Return a table of `tokens` at these token counts and times."""
    return replace(TABLE, rows=(*BASE, *(CostRow("tokens", k, 1, ms, ms, ms, 1) for k, ms in points)))


def times() -> st.SearchStrategy[float]:
    return st.floats(1e-3, 1e6)


def row_of(kind: str, count: int, batch_size: int) -> st.SearchStrategy[CostRow]:
    spreads = st.lists(times(), min_size=3, max_size=3).map(sorted)
    return st.builds(
        lambda spread, launches: CostRow(kind, count, batch_size, spread[1], spread[0], spread[2], launches),
        spreads,
        st.integers(1, 1000),
    )


@st.composite
def cost_tables(draw: st.DrawFn) -> CostTable:
    batch_sizes = draw(st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True))
    more = st.sampled_from([("deep", 0), ("masked_1", 0), ("reuse", 0), ("tokens", 3), ("tokens_2", 4), ("tokens", 16)])
    keys = [
        (kind, count, batch_size)
        for batch_size in batch_sizes
        for kind, count in [("full", 0), ("conditioning", 0), *draw(st.lists(more, unique=True))]
    ]
    return replace(
        TABLE,
        model=draw(model_identities()),
        guidance=draw(st.sampled_from(["classifier_free", "none"])),
        deep_start=draw(st.none() | st.integers(0, 30)),
        selector=draw(st.none() | selectors()),
        mask=draw(st.none() | st.just(("x.", ".x"))),
        gpu=draw(st.none() | text()),
        machine=draw(st.builds(Machine, text(), st.integers(1, 256), text(), text())),
        num_steps=draw(st.integers(1, 1000)),
        rows=draw(st.tuples(*(row_of(*key) for key in keys))),
        made_by=draw(made_by()),
    )


# the file


@examples(25)
@given(table=cost_tables())
def test_a_written_table_reads_back_equal(table: CostTable, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("costs") / "table.json"
    write_cost_table(table, path)
    assert read_cost_table(path) == table


def test_the_golden_table_keeps_loading() -> None:
    assert read_cost_table(GOLDEN) == TABLE
    assert read_cost_tables(GOLDEN) == (TABLE,)


def test_the_golden_table_is_written_as_it_was_read(tmp_path: Path) -> None:
    write_cost_table(read_cost_table(GOLDEN), tmp_path / "table.json")
    assert (tmp_path / "table.json").read_bytes() == GOLDEN.read_bytes()


REFUSED: list[tuple[list[str | int], Any, str]] = [
    (["schema"], 2, "cost_table.json.schema: expected one of 1, found 2"),
    (["surprise"], 1, "unknown key 'surprise'"),
    (["rows", 0, "kind"], "turbo", "rows[0]: 'turbo' is no kind of step, and neither `conditioning` nor"),
    (["rows", 0, "kind"], "text_encoder", "rows[0]: 'text_encoder' is no kind of step"),
    (["rows", 0, "kind"], "full_1", "rows[0]: 'full_1' is no kind of step"),
    (["rows", 1, "tokens"], 4, "rows[1]: `full` of 4 tokens; `tokens` has 1 or more, all others 0"),
    (["rows", 3, "tokens"], 0, "rows[3]: `tokens` of 0 tokens"),
    (["rows", 3, "tokens"], -2, "rows[3]: `tokens` of -2 tokens"),
    (["rows", 3, "tokens"], 2.5, "rows[3].tokens: expected an integer, found 2.5"),
    (["rows", 0, "batch_size"], 0, "rows[0]: batch_size and count are 1 or more, not 0 and 20"),
    (["rows", 0, "count"], 0, "rows[0]: batch_size and count are 1 or more, not 1 and 0"),
    (["rows", 0, "median_ms"], 3.0, "rows[0]: `conditioning` took 1.5 ≤ 3.0 ≤ 2.5 ms: times are above 0"),
    (["rows", 0, "p10_ms"], 0.0, "rows[0]: `conditioning` took 0.0 ≤"),
    (["rows", 0, "p90_ms"], None, "rows[0].p90_ms: expected a finite number, found null"),
    (["rows", 3, "tokens"], 4, "two rows are of one kind, token count and batch size"),
    (["rows", 1, "batch_size"], 2, "there is no row for `full`, batch sizes [1]"),
    (["rows", 0, "batch_size"], 9, "there is no row for `full`, batch sizes [9]"),
    (["rows", 8, "kind"], "reuse", "there is no row for `conditioning`, batch sizes [8]"),
    (["rows"], [], "there is no row for `full`"),
    (["num_steps"], 0, "num_steps is 1 or more, not 0"),
    (["guidance"], "some", "guidance: expected one of 'classifier_free', 'none'"),
    (["machine", "num_cores"], "2", "machine.num_cores: expected an integer"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=[message[:70] for *_, message in REFUSED])
def test_an_invalid_table_is_refused_with_the_place(
    path: list[str | int], value: Any, message: str, tmp_path: Path
) -> None:
    data: Any = json.loads(GOLDEN.read_text())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / GOLDEN.name
    file.write_text(json.dumps(data))
    with pytest.raises(BundleError) as caught:
        read_cost_table(file)
    assert message in str(caught.value)
    assert str(caught.value).startswith("cost_table.json")
    assert "`hemiola measure BUNDLE`" in str(caught.value)


@pytest.mark.parametrize("time", [float("nan"), float("inf"), -1.0])
def test_a_row_has_finite_times_above_0(time: float) -> None:
    with pytest.raises(ValueError, match="times are above 0, finite and in order"):
        CostRow("full", 0, 1, time, time, time, 1)


def _read_or_refuse(path: Path) -> CostTable | None:
    """Read a table; the one exception that may escape becomes None."""
    try:
        return read_cost_table(path)
    except BundleError:
        return None


@examples(50)
@given(content=st.binary(max_size=40) | json_values().map(lambda data: json.dumps(data).encode()))
def test_arbitrary_files_are_refused_as_a_bundle_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("costs") / "table.json"
    path.write_bytes(content)
    assert _read_or_refuse(path) is None


@examples(100)
@given(data=mutated(encode(TABLE)))
def test_a_mutated_table_is_read_as_it_is_or_refused_as_a_bundle_error(
    data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("costs") / "table.json"
    path.write_text(json.dumps(data))
    table = _read_or_refuse(path)
    assert table is None or encode(table) == data


# tables of a bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder that looks like a bundle to whoever reads its cost tables."""
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / MANIFEST_FILE).write_text("{}")
    return tmp_path / "bundle"


OTHERS: Final = [
    replace(TABLE, gpu="NVIDIA H200"),
    replace(TABLE, gpu=None),
    replace(TABLE, machine=replace(TABLE.machine, num_cores=8)),
    replace(TABLE, machine=replace(TABLE.machine, python="3.12.0")),
]


def test_a_machine_and_gpu_have_one_table_in_a_bundle(bundle: Path) -> None:
    again = replace(TABLE, num_steps=20)
    for table in (TABLE, *OTHERS, again):
        write_cost_table(table, bundle / table.file)
    files = [path.relative_to(bundle).as_posix() for path in (bundle / "costs").iterdir()]
    assert sorted(files) == sorted({table.file for table in (TABLE, *OTHERS)})
    assert len(files) == 1 + len(OTHERS)
    assert all(re.fullmatch(r"costs/[0-9a-f]{12}\.json", file) for file in files)
    found = read_cost_tables(bundle)
    assert sorted(found, key=str) == sorted([again, *OTHERS], key=str)
    assert found == stored_cost_tables(bundle)
    assert {table.where for table in found} > {"NVIDIA L4, A Processor, 16 cores", "A Processor, 16 cores"}


def test_a_bundle_that_was_not_measured_has_no_tables_and_whoever_wants_one_learns_what_to_run(bundle: Path) -> None:
    assert stored_cost_tables(bundle) == ()
    with pytest.raises(BundleError) as caught:
        read_cost_tables(bundle)
    assert f"the bundle {bundle} has no cost table. Measure it with `hemiola measure {bundle}`" in str(caught.value)


def test_a_folder_that_is_no_bundle_has_no_tables(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is no bundle: it has no manifest\.json"):
        read_cost_tables(tmp_path)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot read the cost table .*: No such file or directory"):
        read_cost_tables(tmp_path / "missing")


def test_one_damaged_table_of_a_bundle_is_refused_by_its_name(bundle: Path) -> None:
    for table in (TABLE, OTHERS[0]):
        write_cost_table(table, bundle / table.file)
    (bundle / TABLE.file).write_text("{")
    with pytest.raises(BundleError, match=f"^{Path(TABLE.file).name}: not valid JSON"):
        read_cost_tables(bundle)


# what is looked up


@pytest.mark.parametrize(
    ("kind", "count", "milliseconds"),
    [
        ("full", 0, 10.0),
        ("conditioning", 0, 2.0),
        ("tokens", 2, 2.0),
        ("tokens", 3, 2.5),  # half way from 2 to 4
        ("tokens", 5, 3.25),  # a quarter of the way from 4 to 8
        ("tokens", 10, 4.5),  # a quarter of a millisecond for each beyond 8
        ("tokens", 1, 2.0),  # and not 1.5, as the line would have it
        ("reuse_2", 0, 1.0),
        ("reuse", 0, None),
        ("tokens_1", 4, None),
        ("masked", 0, None),
    ],
)
def test_times_are_those_that_were_measured_or_lie_on_lines_between(
    kind: str, count: int, milliseconds: float | None
) -> None:
    assert TABLE.milliseconds(kind, count, 1) == milliseconds


def test_a_batch_size_that_was_not_measured_has_no_times() -> None:
    assert TABLE.batch_sizes == (1, 8)
    assert [TABLE.milliseconds("full", 0, size) for size in (1, 4, 8)] == [10.0, None, 70.0]
    assert TABLE.milliseconds("deep", 0, 8) is None


def test_a_row_is_found_by_its_key_alone() -> None:
    assert TABLE.row("tokens", 4, 1) == CostRow("tokens", 4, 1, 3.0, 2.75, 3.25, 20)
    assert TABLE.row("tokens", 3, 1) is None
    assert TABLE.row("tokens", 4, 8) is None


def points(min_size: int = 1) -> st.SearchStrategy[dict[int, float]]:
    return st.dictionaries(st.integers(1, 4096), times(), min_size=min_size, max_size=6)


@examples(60)
@given(measured=points())
def test_a_measured_count_costs_what_was_measured_to_the_last_bit(measured: dict[int, float]) -> None:
    table = table_of(measured.items())
    assert {k: table.milliseconds("tokens", k, 1) for k in measured} == measured


@examples(60)
@given(measured=points(min_size=2), data=st.data())
def test_between_two_counts_the_cost_is_between_theirs(measured: dict[int, float], data: st.DataObject) -> None:
    counts = sorted(measured)
    i = data.draw(st.integers(0, len(counts) - 2))
    asked = data.draw(st.integers(counts[i], counts[i + 1]) | st.floats(counts[i], counts[i + 1]))
    found = table_of(measured.items()).milliseconds("tokens", asked, 1)
    assert found is not None
    low, high = sorted([measured[counts[i]], measured[counts[i + 1]]])
    assert low * (1 - 1e-12) <= found <= high * (1 + 1e-12)


@examples(60)
@given(measured=points(), beyond=st.integers(1, 8192))
def test_beyond_what_was_measured_nothing_costs_less_than_the_smallest_count(
    measured: dict[int, float], beyond: int
) -> None:
    table = table_of(measured.items())
    for asked in {max(measured) + beyond, max(0, min(measured) - beyond)}:
        found = table.milliseconds("tokens", asked, 1)
        assert found is not None
        assert found >= measured[min(measured)]


@examples(60)
@given(
    counts=st.sets(st.integers(1, 4096), min_size=2, max_size=6),
    slope=st.floats(0, 10),
    start=times(),
    asked=st.integers(1, 8192),
)
def test_times_on_a_straight_line_stay_on_it(counts: set[int], slope: float, start: float, asked: int) -> None:
    table = table_of((k, start + slope * k) for k in counts)
    assert table.milliseconds("tokens", asked, 1) == pytest.approx(start + slope * max(asked, min(counts)), rel=1e-6)


@given(measured=times(), asked=st.integers(0, 8192))
def test_one_count_alone_stands_for_all(measured: float, asked: int) -> None:
    assert table_of([(7, measured)]).milliseconds("tokens", asked, 1) == measured


# steps and trajectories


@pytest.mark.parametrize(
    ("step", "count", "milliseconds"),
    [
        (FULL, 0.0, 10.0),
        (REUSE, 0.0, None),
        (Step(Forward.REUSE, None, (3.0, -3.0, 1.0)), 0.0, 1.0),
        (tokens(4), 4.0, 3.0),
        (tokens(((1, 3), (2, 4))), 2.5, 2.25),  # a quarter of the way from 2 to 4
        (Step(Forward.TOKENS, 4, (2.0, -1.0)), 4.0, None),  # tokens_1
    ],
)
def test_a_step_costs_what_its_kind_and_mean_token_count_cost(
    step: Step, count: float, milliseconds: float | None
) -> None:
    assert mean_tokens(step) == count
    assert TABLE.step_ms(step, 1) == milliseconds


def test_a_trajectory_costs_the_sum_of_its_launches() -> None:
    # conditioning 2, decoder 20, full 10 + 10, tokens 3, deep 5
    assert TABLE.trajectory_ms([FULL, tokens(4), DEEP, FULL], 1) == 50.0
    assert TABLE.trajectory_ms([FULL, REUSE], 1) is None
    assert TABLE.trajectory_ms([FULL], 8) is None  # whose decoder was not measured
    assert table_of([]).trajectory_ms([FULL, FULL], 1) == 3.0  # of a bundle that has none


@pytest.mark.parametrize(
    ("change", "guidance", "parts"),
    [
        ({"weights_sha256": "cd" * 32}, "classifier_free", ["weights abababababab", "weights cdcdcdcdcdcd"]),
        ({"family": "pixart"}, "classifier_free", ["digits (dit", "digits (pixart"]),
        ({"latent_shape": (4, 8, 16)}, "classifier_free", ["latents of shape [4, 8, 8]", "shape [4, 8, 16]"]),
        ({}, "none", ["guidance `classifier_free`", "guidance `none`"]),
    ],
)
def test_the_costs_of_another_model_are_refused_with_both_sides(
    change: dict[str, Any], guidance: str, parts: list[str]
) -> None:
    with pytest.raises(BundleError) as caught:
        TABLE.check_model(replace(TABLE.model, **change), guidance)
    assert [part for part in (*parts, "`hemiola measure BUNDLE`") if part not in str(caught.value)] == []


def test_the_costs_of_a_model_that_is_called_otherwise_are_taken() -> None:
    TABLE.check_model(replace(TABLE.model, name="the digits"), "classifier_free")
    assert TABLE.model.name == "digits"
