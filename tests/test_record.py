from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.codec import encode, write_json
from hemiola_search.errors import SearchError
from hemiola_search.record import CostSource, Point, SearchRecord, read_record
from strategies import digests, examples, finite, made_by, mutated, text

GOLDEN: Final = Path(__file__).parent / "golden" / "search.json"
RECORD: Final = SearchRecord(
    schema=3,
    model="digits",
    sampler="DDIM-6",
    guidance_scale=4.0,
    num_images=10,
    num_held_out=40,
    effort="quick",
    costs=CostSource("ms", "onnxruntime 1.23.2, fp32, batch 1, A Processor, 16 cores", ("masked",)),
    limits={"2 full": 26.5, "2.5×": 24.0},
    chosen="0123456789abcdef01234567",
    points=(
        Point(
            budget="",
            strategy="full",
            name="uncached",
            key="76543210fedcba9876543210",
            num_steps=6,
            rhythm="FFFFFF",
            max_tokens=0,
            images="held_out",
            quality={"relative_l2": 0.0, "psnr": 100.0, "ssim": 1.0},
            intervals={"relative_l2": (0.0, 0.0), "psnr": (100.0, 100.0), "ssim": (1.0, 1.0)},
            path=(),
            cost=62.5,
            tera_flops=0.0625,
        ),
        Point(
            budget="2 full",
            strategy="procache",
            name="3×2 selective",
            key="0123456789abcdef01234567",
            num_steps=6,
            rhythm="FCSFCS",
            max_tokens=16,
            images="searched",
            quality={"relative_l2": 0.125, "psnr": 24.5, "ssim": 0.875},
            intervals={},
            path=(),
            cost=26.25,
            tera_flops=0.025,
        ),
        Point(
            budget="2 full",
            strategy="procache",
            name="3×2 selective",
            key="0123456789abcdef01234567",
            num_steps=6,
            rhythm="FCSFCS",
            max_tokens=16,
            images="held_out",
            quality={"relative_l2": 0.25, "psnr": 23.5, "ssim": 0.75, "agreement": 0.975},
            intervals={"relative_l2": (0.125, 0.5), "agreement": (0.925, 1.0)},
            path=(0.0, 0.0625, 0.125, 0.125, 0.1875, 0.25),
            cost=26.25,
            tera_flops=0.025,
        ),
    ),
    failures={"2 full": {"toca": "no such schedule keeps to 2 full: 26.5 ms"}, "2.5×": {}},
    made_by=MadeBy("hemiola search digits --budget 2 --budget 2.5x", {"hemiola": "0.1.0", "torch": "2.13.0"}, None),
    prompts=("a red circle",),
)


def points() -> st.SearchStrategy[Point]:
    figures = st.dictionaries(st.sampled_from(["relative_l2", "psnr", "agreement"]), finite(), max_size=3)
    pairs = st.dictionaries(st.just("relative_l2"), st.tuples(finite(), finite()))
    return st.builds(
        Point,
        budget=text(),
        strategy=text(),
        name=text(),
        key=digests(),
        num_steps=st.integers(1, 1000),
        rhythm=st.text("FCDMS12¹", min_size=1, max_size=8),
        max_tokens=st.integers(0, 256),
        images=st.sampled_from(["searched", "held_out"]),
        quality=figures,
        intervals=pairs,
        path=st.lists(finite(), max_size=3).map(tuple),
        cost=finite(),
        tera_flops=finite(),
    )


@given(
    drawn=st.lists(points(), max_size=3),
    limits=st.dictionaries(text(), finite(), max_size=2),
    maker=made_by(),
    prompts=st.lists(text(), max_size=2),
)
@examples(30)
def test_a_written_record_reads_back_equal(
    drawn: list[Point],
    limits: dict[str, float],
    maker: MadeBy,
    prompts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("record") / "search.json"
    record = replace(RECORD, points=tuple(drawn), limits=limits, made_by=maker, prompts=tuple(prompts))
    write_json(record, path)
    assert read_record(path) == record


def test_the_golden_record_keeps_loading_and_is_written_as_it_was_read(tmp_path: Path) -> None:
    assert read_record(GOLDEN) == RECORD
    write_json(RECORD, tmp_path / "search.json")
    assert (tmp_path / "search.json").read_bytes() == GOLDEN.read_bytes()


def test_points_of_held_out_images_are_those_that_reports_show() -> None:
    assert RECORD.held_out == (RECORD.points[0], RECORD.points[2])
    assert [point.num_full for point in RECORD.points] == [6, 2, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*search.json: No such file.*`hemiola search` writes it"),
        ("{", "search.json: not valid JSON.*`hemiola search` writes valid records"),
        ('{"schema": 3}', "search.json: missing key 'model'"),
        ('{"schema": 2}', "search.json.schema: expected one of 3, found 2.*`hemiola search` writes valid records"),
        ('{"schema": 1, "points": []}', "search.json.schema: expected one of 3, found 1"),
    ],
)
def test_a_record_that_is_none_or_of_an_earlier_release_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "search.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SearchError, match=message):
        read_record(path)


@given(data=mutated(encode(RECORD)))
@examples(60)
def test_a_mutated_record_is_read_or_refused_as_a_search_error(
    data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("record") / "search.json"
    path.write_text(json.dumps(data))
    try:
        record = read_record(path)
    except SearchError:
        return
    assert encode(record) == data
