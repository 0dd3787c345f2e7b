from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.codec import encode
from hemiola_runtime.errors import BundleError, ScheduleError
from hemiola_runtime.graph_set import GRAPHS_FILE, Graphs, GraphSet, read_graph_set, write_graph_set
from hemiola_runtime.graphs import PRECISIONS, GraphSpec, TensorSpec, WeightSpec
from hemiola_runtime.manifest import (
    MANIFEST_FILE,
    PROFILE_SYMBOLS,
    BackendSpec,
    EngineSpec,
    FileSpec,
    Manifest,
    Profile,
    read_manifest,
    write_manifest,
)
from hemiola_runtime.pipeline import Pipeline, TextSpec
from hemiola_runtime.schedule import DEEP, FULL, REUSE, Schedule, TokenSelector, read_schedule, tokens
from strategies import examples, json_values, manifests, mutated

GOLDEN: Final = Path(__file__).parent / "golden"
SCHEDULE: Final = read_schedule(GOLDEN / "schedule.json")  # FCSFCDFF from block 3, for the model `digits`
FORECASTS: Final = read_schedule(GOLDEN / "forecasts.json")  # FF1SMF2D of the same model, from block 2
ALL_FORWARDS: Final = {"full", "deep", "tokens", "reuse"}
MADE_BY: Final = MadeBy("hemiola build", {"hemiola": "0.1.0"}, None)

PIPELINE: Final = Pipeline(
    model=SCHEDULE.model,
    guidance="classifier_free",
    num_blocks=4,
    width=32,
    patch_size=2,
    branches=("attention", "mlp"),
    state_rows=1,
    deep_start=3,
    selector=SCHEDULE.selector,
    mask=(".x.x", "xx.."),
    has_block_counts=True,
    labels={"0": "zero", "1": "one"},
    text=None,
    min_size=(8, 8),
    max_size=(8, 8),
    pixels_per_latent=2,
    image_channels=3,
    tile_size=None,
    guidance_scale=3.5,
)

TEXT_PIPELINE: Final = replace(
    PIPELINE,
    branches=("attention", "cross", "mlp"),
    mask=None,
    has_block_counts=False,
    labels={},
    text=TextSpec(120),
    min_size=(4, 6),
    max_size=(12, 16),
    tile_size=10,
    guidance_scale=4.5,
)

GRAPH: Final = GraphSpec(
    name="full",
    file="engines/full.onnx",
    sha256="ab" * 32,
    inputs=(TensorSpec("state", "float32", (1, "B", 16, 16)), TensorSpec("input_scale", "float32", ())),
    outputs=(TensorSpec("next_state", "float32", (1, "B", 16, 16)),),
    weights=(WeightSpec("blocks.0.weight", "float32", (32, 32), 256),),
    activation_bytes_per_row=4096,
)

DECODER: Final = GraphSpec(
    name="vae_decoder",
    file="fp32/vae_decoder.onnx",
    sha256="cd" * 32,
    inputs=(TensorSpec("latents", "float32", ("B", "rows", "columns", 2, 2, 4)),),
    outputs=(TensorSpec("images", "float32", ("B", "height", "width", 3)),),
    weights=(),
    activation_bytes_per_row=8192,
)

TOKENS: Final = replace(
    GRAPH,
    name="tokens_1",
    file="fp32/tokens_1.onnx",
    inputs=(
        TensorSpec("forecast", "float32", (2,)),
        TensorSpec("token_slots", "int64", ("K",)),
        TensorSpec("token_slots.mlp.3", "int64", ("K.mlp.3",)),
        TensorSpec("mlp_cache.3", "float32", ("R", 16, 32)),
        TensorSpec("mlp_cache.3.1", "float32", ("R", 16, 32)),
    ),
)

PROFILES: Final = (Profile({"B": (1, 1, 1)}), Profile({"B": (2, 8, 8), "K": (4, 8, 8), "K.mlp.3": (2, 8, 8)}))

MANIFEST: Final = Manifest(
    schema=4,
    backend=BackendSpec("tensorrt", "10.13.3", "NVIDIA L4", ("8.9",)),
    pipeline=PIPELINE,
    precision="fp16",
    max_batch_size=8,
    engines={
        "conditioning": EngineSpec(replace(GRAPH, name="conditioning"), "ef" * 32, ()),
        "front": EngineSpec(replace(GRAPH, name="front"), "cd" * 32, PROFILES),
        "deep": EngineSpec(replace(GRAPH, name="deep"), "ab" * 32, PROFILES),
    },
    forwards={"full": ("front", "deep"), "deep": ("deep",), "deep_1": ("deep",)},
    schedules={"full": "schedules/full.json"},
    solvers={SCHEDULE.scheduler.digest: "solvers/DDIM-8.json"},
    files={
        "engines/full.onnx": FileSpec("ab" * 32, 1000),
        "engines/weights.bin": FileSpec("01" * 32, 4352),
        "schedules/full.json": FileSpec("23" * 32, 10),
        "solvers/DDIM-8.json": FileSpec("45" * 32, 20),
    },
    parity={"full": 1e-6},
    forward_parity={"full": 1e-3, "deep": 2e-3, "deep_1": 3e-3},
    made_by=MADE_BY,
)

GRAPH_SET: Final = GraphSet(
    schema=4,
    pipeline=TEXT_PIPELINE,
    format="onnx",
    precisions={
        "fp32": Graphs(
            {"full": replace(GRAPH, file="fp32/full.onnx"), "tokens_1": TOKENS, "vae_decoder": DECODER}, "01" * 32
        ),
        "bf16": Graphs({"full": replace(GRAPH, file="bf16/full.onnx")}, "67" * 32),
    },
    schedules=MANIFEST.schedules,
    solvers=MANIFEST.solvers,
    has_reference=True,
    made_by=MADE_BY,
)


def written(data: Any, folder: Path, name: str = MANIFEST_FILE) -> Path:
    (folder / name).write_text(json.dumps(data))
    return folder


@examples(15)
@given(manifest=manifests())
def test_a_written_manifest_reads_back_equal(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bundle")
    write_manifest(manifest, folder)
    assert read_manifest(folder) == manifest


def test_a_written_graph_set_reads_back_equal(tmp_path: Path) -> None:
    write_graph_set(GRAPH_SET, tmp_path)
    assert read_graph_set(tmp_path) == GRAPH_SET


def test_the_golden_manifest_keeps_loading() -> None:
    assert read_manifest(GOLDEN) == MANIFEST


def test_the_golden_graph_set_keeps_loading() -> None:
    assert read_graph_set(GOLDEN) == GRAPH_SET


READERS: Final = [
    (read_manifest, MANIFEST_FILE, "`hemiola build` writes bundles"),
    (read_graph_set, GRAPHS_FILE, "`hemiola export` writes such folders"),
]


@pytest.mark.parametrize("schema", [1, 2, 3])
@pytest.mark.parametrize(("read", "name", "mend"), READERS)
def test_a_file_of_an_older_schema_is_refused_by_its_number_with_the_command_that_writes_it_anew(
    read: Callable[[Path], object], name: str, mend: str, schema: int
) -> None:
    folder = GOLDEN / f"schema_{schema}"
    assert json.loads((folder / name).read_text())["schema"] == schema
    with pytest.raises(BundleError) as caught:
        read(folder)
    assert str(caught.value).startswith(f"{name}.schema: expected one of 4, found {schema}")
    assert mend in str(caught.value)


@pytest.mark.parametrize(("read", "name", "mend"), READERS)
def test_a_folder_without_its_description_is_refused_with_the_command_that_makes_one(
    read: Callable[[Path], object], name: str, mend: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError) as caught:
        read(tmp_path)
    assert f"{name}: No such file or directory" in str(caught.value)
    assert mend in str(caught.value)


REFUSED: list[tuple[list[str | int], Any, str]] = [
    (["schema"], 3, "manifest.json.schema: expected one of 4, found 3"),
    (["schema"], 5, "manifest.json.schema: expected one of 4, found 5"),
    (["surprise"], 1, "manifest.json: unknown key 'surprise'"),
    (["pipeline", "surprise"], 1, "manifest.json.pipeline: unknown key 'surprise'"),
    (["precision"], "int8", "manifest.json.precision: expected one of 'fp32', 'fp16', 'bf16', found \"int8\""),
    (["max_batch_size"], 0, "manifest.json: max_batch_size is 1 or more, not 0"),
    (["max_batch_size"], 1.5, "manifest.json.max_batch_size: expected an integer, found 1.5"),
    (["backend", "version"], 1, "manifest.json.backend.version: expected a string, found 1"),
    (["backend", "gpu"], 0, "manifest.json.backend.gpu: expected a string, found 0"),
    (["backend", "compute_capabilities"], "8.9", "manifest.json.backend.compute_capabilities: expected a list"),
    (["backend", "compute_capabilities", 0], 8.9, "backend.compute_capabilities[0]: expected a string, found 8.9"),
    (["pipeline", "guidance"], "some", "manifest.json.pipeline.guidance: expected one of 'classifier_free', 'none'"),
    (["pipeline", "labels", "0"], 0, "manifest.json.pipeline.labels.0: expected a string, found 0"),
    (["pipeline", "labels"], {"1": "one"}, "manifest.json.pipeline: labels are numbered from 0, one after the other"),
    (["pipeline", "labels"], {}, "manifest.json.pipeline: images are drawn of labels or of prompts, one of the two"),
    (["pipeline", "text"], {"num_tokens": 120}, "pipeline: images are drawn of labels or of prompts, one"),
    (["pipeline", "text"], {}, "manifest.json.pipeline.text: missing key 'num_tokens'"),
    (["pipeline", "patch_size"], 2.0, "manifest.json.pipeline.patch_size: expected an integer, found 2.0"),
    (["pipeline", "min_size"], [8], "manifest.json.pipeline.min_size: expected a list of 2"),
    (["pipeline", "min_size"], [8, 9], "manifest.json.pipeline: the sides 9 ≤ 8 ≤ 8 of a picture are out of order"),
    (["pipeline", "min_size"], [0, 8], "manifest.json.pipeline: the sides 0 ≤ 8 ≤ 8 of a picture are out of order"),
    (["pipeline", "max_size"], [7, 8], "manifest.json.pipeline: the sides 8 ≤ 8 ≤ 7 of a picture are out of order"),
    (["pipeline", "guidance_scale"], "4", 'manifest.json.pipeline.guidance_scale: expected a finite number, found "4"'),
    (["pipeline", "tile_size"], "8", "manifest.json.pipeline.tile_size: expected an integer"),
    (["pipeline", "selector", "score"], "luck", "manifest.json.pipeline.selector.score: expected one of"),
    (["engines", "deep", "graph", "inputs", 0, "dtype"], "bf16", "engines.deep.graph.inputs[0].dtype: expected one of"),
    (["engines", "deep", "graph", "inputs", 0, "shape", 1], 1.5, "engines.deep.graph.inputs[0].shape[1]: expected"),
    (["engines", "deep", "graph", "weights", 0, "offset"], "0", "engines.deep.graph.weights[0].offset: expected an i"),
    (["engines", "deep", "graph", "file"], "full.onnx", "'full.onnx' is used but has no digest in `files`"),
    (["schedules", "fast"], "schedules/fast.json", "'schedules/fast.json' is used but has no digest in `files`"),
    (["solvers", "00"], "solvers/other.json", "'solvers/other.json' is used but has no digest in `files`"),
    (["schedules"], {}, "there is no schedule `full`"),
    (["forwards", "full", 1], "back", "manifest.json: there is no engine back"),
    (["forwards", "reuse"], ["reuse"], "manifest.json: there is no engine reuse"),
    (["forwards", "shallow"], ["front"], "manifest.json: shallow is no forward"),
    (["forwards", "front"], ["front"], "manifest.json: front is no forward"),
    (["forwards", "full_1"], ["deep"], "manifest.json: full_1 is no forward"),
    (["forwards", "deep_5"], ["deep"], "manifest.json: deep_5 is no forward"),
    (["forwards", "deep"], [], "manifest.json: a forward, `full` or another, has no engine"),
    (["forwards"], {"deep": ["deep"]}, "manifest.json: a forward, `full` or another, has no engine"),
    (["forwards", "full"], "front", 'manifest.json.forwards.full: expected a list, found "front"'),
    (["forward_parity", "full"], None, "manifest.json.forward_parity.full: expected a finite number"),
    (["engines", "deep", "profiles", 0, "sides", "B"], [1, 2], "profiles[0].sides.B: expected a list of 3"),
    (["engines", "deep", "profiles", 1, "sides", "B"], [2, 1, 8], "profiles[1]: B = 2 ≤ 1 ≤ 8 is no side of a prof"),
    (["files", "engines/weights.bin"], None, "manifest.json.files.engines/weights.bin: expected an object"),
    (["parity", "full"], "good", "manifest.json.parity.full: expected a finite number"),
]


def _changed(path: list[str | int], value: Any, of: Manifest | GraphSet = MANIFEST) -> Any:
    data: Any = json.loads(json.dumps(encode(of)))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=[message[:70] for *_, message in REFUSED])
def test_an_invalid_manifest_is_refused_with_the_place(
    path: list[str | int], value: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError) as caught:
        read_manifest(written(_changed(path, value), tmp_path))
    assert message in str(caught.value)
    assert "`hemiola build` writes bundles" in str(caught.value)


def test_a_bundle_without_conditioning_is_refused(tmp_path: Path) -> None:
    engines = {name: encode(engine) for name, engine in MANIFEST.engines.items() if name != "conditioning"}
    with pytest.raises(BundleError, match="there is no engine conditioning"):
        read_manifest(written(_changed(["engines"], engines), tmp_path))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["precisions"], {}, "graphs.json: graphs are fp32, fp16, bf16, not of no precision"),
        (["precisions", "int8"], encode(GRAPH_SET.precisions["fp32"]), "fp32, fp16, bf16, not fp32, bf16, int8"),
        (["precisions", "bf16", "graphs", "full", "file"], "../full.onnx", "the path '../full.onnx' leaves the bundle"),
        (["precisions", "bf16"], None, "graphs.json.precisions.bf16: expected an object, found null"),
        (["schedules", "full"], "/full.json", "the path '/full.json' leaves the bundle"),
        (["format"], "jax", "graphs.json.format: expected one of 'onnx', "),
        (["has_reference"], 1, "graphs.json.has_reference: expected true or false, found 1"),
    ],
)
def test_an_invalid_graph_set_is_refused_with_the_place(
    path: list[str | int], value: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError) as caught:
        read_graph_set(written(_changed(path, value, GRAPH_SET), tmp_path, GRAPHS_FILE))
    assert message in str(caught.value)
    assert "`hemiola export` writes such folders" in str(caught.value)


@pytest.mark.parametrize("sides", [(1, 1, 1), (1, 1, 8), (1, 8, 8), (2, 5, 8)])
@pytest.mark.parametrize("symbol", [*PROFILE_SYMBOLS, "K.mlp.3"])
def test_a_profile_covers_from_its_smallest_to_its_largest_number(symbol: str, sides: tuple[int, int, int]) -> None:
    profile = Profile({symbol: sides})
    others = dict.fromkeys(PROFILE_SYMBOLS, 99) | {
        "K": 0,
        "K.mlp.3": 0,
    }  # sides that the profile does not have may be anything
    covered = [number for number in range(12) if profile.covers(others | {symbol: number})]
    assert covered == list(range(sides[0], sides[2] + 1))


def test_a_profile_covers_sizes_only_if_it_covers_each_of_them() -> None:
    profile = Profile({"B": (1, 2, 4), "K": (8, 8, 16)})
    assert profile.covers({"B": 4, "K": 8, "T": 50})
    assert not profile.covers({"B": 5, "K": 8, "T": 50})
    assert not profile.covers({"B": 4, "K": 17, "T": 50})


@pytest.mark.parametrize(
    ("symbol", "sides", "message"),
    [
        ("B", (0, 1, 1), "B = 0 ≤ 1 ≤ 1 is no side of a profile"),
        ("K", (2, 1, 3), "K = 2 ≤ 1 ≤ 3 is no side"),
        ("T", (1, 4, 3), "T = 1 ≤ 4 ≤ 3 is no side"),
        ("R", (1, 1, 2), "R = 1 ≤ 1 ≤ 2 is no side"),
        ("TR", (1, 1, 2), "TR = 1 ≤ 1 ≤ 2 is no side"),
        ("N", (4, 2, 4), "N = 4 ≤ 2 ≤ 4 is no side"),
        ("K.mlp.3", (0, 1, 1), "K.mlp.3 = 0 ≤ 1 ≤ 1 is no side"),
        ("K3", (1, 1, 1), "K3 = 1 ≤ 1 ≤ 1 is no side"),
        ("height", (1, 1, 2), "height = 1 ≤ 1 ≤ 2 is no side"),  # which follows from the rows
    ],
)
def test_a_profile_with_bounds_that_are_none_is_refused(symbol: str, sides: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Profile({"B": (1, 1, 1), symbol: sides})


def test_every_precision_has_a_dtype_of_its_size() -> None:
    sizes = {name: TensorSpec("x", dtype, (3,)).num_bytes({}) for name, dtype in PRECISIONS.items()}
    assert sizes == {"fp32": 12, "fp16": 6, "bf16": 6}


@pytest.mark.parametrize(
    "path",
    [
        "../weights.bin",
        "..",
        "engines/../../weights.bin",
        "engines/../weights.bin",
        "/etc/passwd",
        "",
        "./weights.bin",
        "engines//weights.bin",
        "engines/",
        "engines\\weights.bin",
        "..\\weights.bin",
        "weights\0.bin",
    ],
)
def test_a_path_that_leaves_the_bundle_is_refused(path: str, tmp_path: Path) -> None:
    data = _changed(["files", path], {"sha256": "00" * 32, "num_bytes": 0})
    with pytest.raises(BundleError, match=r"the path .* leaves the bundle"):
        read_manifest(written(data, tmp_path))


@pytest.mark.parametrize("path", ["a", "a/b/c.bin", "..a", "a..b/c", "a b"])
def test_a_path_within_the_bundle_is_taken(path: str, tmp_path: Path) -> None:
    write_manifest(replace(MANIFEST, files={**MANIFEST.files, path: FileSpec("00" * 32, 0)}), tmp_path)
    assert path in read_manifest(tmp_path).files


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"max_batch_size": 8', '"max_batch_size": 8, "max_batch_size": 9', "a key stands twice"),
        ("1e-06", "NaN", "NaN is not a number that JSON knows"),
        ('"schema"', "schema", "not valid JSON"),
    ],
)
def test_text_that_is_not_strict_json_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = json.dumps(encode(MANIFEST))
    assert old in text
    (tmp_path / MANIFEST_FILE).write_text(text.replace(old, new))
    with pytest.raises(BundleError, match=message):
        read_manifest(tmp_path)


def _read_or_refuse(folder: Path) -> Manifest | None:
    """Read a manifest; the one exception that may escape becomes None."""
    try:
        return read_manifest(folder)
    except BundleError:
        return None


@examples(50)
@given(data=json_values())
def test_arbitrary_json_is_refused_as_a_bundle_error(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert _read_or_refuse(written(data, tmp_path_factory.mktemp("bundle"))) is None


@examples(50)
@given(content=st.binary(max_size=40))
def test_arbitrary_bytes_are_refused_as_a_bundle_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("bundle")
    (folder / MANIFEST_FILE).write_bytes(content)
    assert _read_or_refuse(folder) is None


@examples(150)
@given(data=mutated(encode(MANIFEST)))
def test_a_mutated_manifest_is_read_as_it_is_or_refused_as_a_bundle_error(
    data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    manifest = _read_or_refuse(written(data, tmp_path_factory.mktemp("bundle")))
    assert manifest is None or encode(manifest) == data


def test_a_shape_is_resolved_by_the_symbols_of_the_pipeline() -> None:
    symbols = PIPELINE.symbols(batch_size=3, num_evaluations=5)
    # two rows per guided image: R = 2 · 3, and a table of T · R = 5 · 6 rows; 8 × 8 latents in patches of 2 × 2
    of_picture = {"N": 16, "rows": 4, "columns": 4, "height": 16, "width": 16}
    assert symbols == {"B": 3, "R": 6, "K": 0, "T": 5, "TR": 30} | of_picture
    spec = TensorSpec("x", "float32", ("B", "R", "N", "T", "TR", 7))
    assert spec.resolve(symbols) == (3, 6, 16, 5, 30, 7)
    assert spec.num_bytes(symbols) == 4 * 3 * 6 * 16 * 5 * 30 * 7


def test_a_shape_follows_the_size_of_the_picture() -> None:
    symbols = TEXT_PIPELINE.symbols(1, 5, (4, 16))
    # 2 × 8 patches; 2 pixels for each latent
    assert [symbols[name] for name in ("N", "rows", "columns", "height", "width")] == [16, 2, 8, 8, 32]
    assert TensorSpec("x", "float32", ("rows", "columns", "height", "width")).resolve(symbols) == (2, 8, 8, 32)
    assert TEXT_PIPELINE.symbols(1, 5) == TEXT_PIPELINE.symbols(1, 5, (8, 8))


@pytest.mark.parametrize("side", ["n", "W", "Rows", "K3", -1])
def test_a_side_that_is_no_symbol_is_refused(side: str | int) -> None:
    with pytest.raises(ValueError, match=f"{side!r} is no side of a shape; symbols are B, R, K, T, TR, N, rows, col"):
        TensorSpec("x", "float32", (side,))


@pytest.mark.parametrize(
    ("size", "grid", "num_tokens", "shape"),
    [((8, 8), (4, 4), 16, (16, 16, 3)), ((4, 6), (2, 3), 6, (8, 12, 3)), ((12, 16), (6, 8), 48, (24, 32, 3))],
)
def test_a_picture_has_as_many_tokens_as_patches_and_pixels_for_each_latent(
    size: tuple[int, int], grid: tuple[int, int], num_tokens: int, shape: tuple[int, int, int]
) -> None:
    assert TEXT_PIPELINE.grid_of(size) == grid
    assert TEXT_PIPELINE.tokens_of(size) == num_tokens
    assert TEXT_PIPELINE.image_shape(size) == shape


def test_the_default_size_is_that_of_the_model() -> None:
    wide = replace(TEXT_PIPELINE, model=replace(TEXT_PIPELINE.model, latent_shape=(4, 6, 16)))
    assert (wide.size, wide.num_tokens) == ((6, 16), 24)


@pytest.mark.parametrize(
    ("size", "is_tiled", "tile"),
    [
        ((8, 8), False, (8, 8)),
        ((10, 10), False, (10, 10)),
        ((12, 10), True, (10, 10)),
        ((4, 12), True, (4, 10)),
        ((12, 16), True, (10, 10)),
    ],
)
def test_pictures_with_a_side_larger_than_a_tile_are_cut(
    size: tuple[int, int], is_tiled: bool, tile: tuple[int, int]
) -> None:
    assert TEXT_PIPELINE.is_tiled(size) is is_tiled
    assert TEXT_PIPELINE.tile_of(size) == tile


def test_without_tiles_pictures_of_any_size_are_decoded_whole() -> None:
    untiled = replace(TEXT_PIPELINE, tile_size=None)
    assert not untiled.is_tiled((12, 16))
    assert untiled.tile_of((12, 16)) == (12, 16)


@pytest.mark.parametrize(("guidance", "rows"), [("classifier_free", 2), ("none", 1)])
def test_a_guided_image_is_two_rows(guidance: Any, rows: int) -> None:
    pipeline = replace(PIPELINE, guidance=guidance)
    assert pipeline.rows_per_image == rows
    assert pipeline.symbols(batch_size=3, num_evaluations=5)["R"] == 3 * rows


@pytest.mark.parametrize(
    ("spec", "num_bytes"),
    [
        (TensorSpec("scalar", "float32", ()), 4),
        (TensorSpec("labels", "int64", ("B",)), 8 * 3),
        (TensorSpec("empty", "float32", (0, "B")), 0),
    ],
)
def test_the_size_of_a_tensor_follows_from_its_dtype(spec: TensorSpec, num_bytes: int) -> None:
    assert spec.num_bytes({"B": 3}) == num_bytes


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 24), ("float16", 12), ("bfloat16", 12), ("int64", 48)])
def test_the_size_of_a_weight_follows_from_its_dtype(dtype: Any, num_bytes: int) -> None:
    assert WeightSpec("w", dtype, (2, 3), 0).num_bytes == num_bytes


def test_a_schedule_needs_the_forwards_that_it_runs_and_no_others() -> None:
    PIPELINE.check_schedule(SCHEDULE, ALL_FORWARDS)
    PIPELINE.check_schedule(SCHEDULE.uncached(), {"full"})
    replace(PIPELINE, deep_start=2).check_schedule(FORECASTS, set(FORECASTS.kinds))
    with pytest.raises(ScheduleError, match="runs `deep, reuse, tokens`, but only full were exported"):
        PIPELINE.check_schedule(SCHEDULE, {"full"})


@pytest.mark.parametrize(
    ("min_size", "tile_size", "sizes"),
    [
        ((8, 8), None, {(16, 16)}),
        ((8, 8), 12, {(16, 16), (12, 12)}),  # at 12 × 12 the decoder is part of the trajectory
        ((8, 8), 4, {(16, 16)}),  # nothing as small as a tile is ever drawn
    ],
)
def test_the_sizes_that_may_take_the_most_memory_can_be_drawn(
    min_size: tuple[int, int], tile_size: int | None, sizes: set[tuple[int, int]]
) -> None:
    changed = replace(PIPELINE, min_size=min_size, max_size=(16, 16), tile_size=tile_size)
    assert changed.demanding_sizes == sizes


def _of_other_model(**changes: Any) -> Schedule:
    return replace(SCHEDULE, model=replace(SCHEDULE.model, **changes))


MISMATCHED: list[tuple[str, Schedule, Pipeline, set[str], list[str]]] = [
    (
        "other weights",
        _of_other_model(name="letters", weights_sha256="ee" * 32),
        PIPELINE,
        ALL_FORWARDS,
        ["letters (weights eeeeeeeeeeee)", "digits (weights 0f343b093112)", "Search a schedule for this model"],
    ),
    (
        "other family",
        _of_other_model(family="pixart", name="letters"),
        PIPELINE,
        ALL_FORWARDS,
        ["letters", "here is digits"],
    ),
    (
        "other resolution",
        _of_other_model(latent_shape=(4, 16, 16)),
        PIPELINE,
        ALL_FORWARDS,
        ["[4, 16, 16]", "[4, 8, 8]", "Search a schedule at this resolution"],
    ),
    (
        "other guidance",
        replace(SCHEDULE, guidance="none"),
        PIPELINE,
        ALL_FORWARDS,
        ["made with guidance `none`", "here it is `classifier_free`"],
    ),
    (
        "missing forwards",
        SCHEDULE,
        PIPELINE,
        {"full", "reuse"},
        ["runs `deep, tokens`", "only full, reuse were exported", "Export again"],
    ),
    (
        "other deep_start",
        replace(SCHEDULE, deep_start=2),
        PIPELINE,
        ALL_FORWARDS,
        ["needs deep_start = 2", "exported with deep_start = 3", "Export again"],
    ),
    (
        "no deep_start",
        SCHEDULE,
        replace(PIPELINE, deep_start=None),
        ALL_FORWARDS,
        ["needs deep_start = 3", "exported with deep_start = None"],
    ),
    (
        "other selector",
        replace(SCHEDULE, selector=TokenSelector("random", 0.0, 0.0, 1, 5)),
        PIPELINE,
        ALL_FORWARDS,
        ["score='random'", "score='value_norm'", "Export again"],
    ),
    (
        "no selector",
        SCHEDULE,
        replace(PIPELINE, selector=None),
        ALL_FORWARDS,
        ["score='value_norm'", "selector = None"],
    ),
    (
        "missing order",
        FORECASTS,
        replace(PIPELINE, deep_start=2),
        {"full", "reuse", "reuse_2", "tokens", "masked", "deep"},
        ["runs `masked_1, reuse_1`", "only deep, full, masked, reuse, reuse_2, tokens were exported"],
    ),
    (
        "other mask",
        FORECASTS,
        replace(PIPELINE, deep_start=2, mask=("x...", "....")),
        set(FORECASTS.kinds),
        ["needs mask = ('.x.x', 'xx..')", "exported with mask = ('x...', '....')", "Export again"],
    ),
    (
        "counts of blocks",
        FORECASTS,
        replace(PIPELINE, deep_start=2, has_block_counts=False),
        set(FORECASTS.kinds),
        ["a token count for each block", "exported with one for all", "Export again"],
    ),
    (
        "counts of other blocks",
        replace(SCHEDULE, steps=(FULL, REUSE, tokens(((4, 4),)), FULL, REUSE, DEEP, FULL, FULL)),
        PIPELINE,
        ALL_FORWARDS,
        ["step 2 has token counts for 2 blocks", "the graphs take them for 1: one for each deep block"],
    ),
    (
        "counts of other branches",
        replace(SCHEDULE, steps=(FULL, REUSE, tokens(((4,), (4,))), FULL, REUSE, DEEP, FULL, FULL)),
        PIPELINE,
        ALL_FORWARDS,
        ["step 2 has token counts for 1 + 1 blocks", "the graphs take them for 1: one for each deep block"],
    ),
    (
        "too many tokens of a block",
        replace(SCHEDULE, steps=(FULL, REUSE, tokens(((17,),)), FULL, REUSE, DEEP, FULL, FULL)),
        PIPELINE,
        ALL_FORWARDS,
        ["step 2 recomputes 17 tokens", "an image has 16"],
    ),
    (
        "too many tokens",
        replace(SCHEDULE, steps=(FULL, REUSE, tokens(17), FULL, REUSE, DEEP, FULL, FULL)),
        PIPELINE,
        ALL_FORWARDS,
        ["step 2 recomputes 17 tokens", "an image has 16"],
    ),
]


@pytest.mark.parametrize(
    ("schedule", "pipeline", "forwards", "parts"),
    [case[1:] for case in MISMATCHED],
    ids=[case[0] for case in MISMATCHED],
)
def test_a_schedule_made_for_something_else_is_refused_with_both_sides(
    schedule: Schedule, pipeline: Pipeline, forwards: set[str], parts: list[str]
) -> None:
    with pytest.raises(ScheduleError) as caught:
        pipeline.check_schedule(schedule, forwards)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_model_may_go_by_another_name() -> None:
    renamed = replace(PIPELINE, model=replace(PIPELINE.model, name="the same weights elsewhere"))
    assert renamed.model != SCHEDULE.model
    renamed.check_schedule(SCHEDULE, ALL_FORWARDS)


def test_all_tokens_of_an_image_can_be_recomputed() -> None:
    steps = (FULL, REUSE, tokens(16), FULL, REUSE, DEEP, FULL, FULL)
    PIPELINE.check_schedule(replace(SCHEDULE, steps=steps), ALL_FORWARDS)
    with pytest.raises(ScheduleError, match="step 2 recomputes 16 tokens, but an image has 4"):
        replace(PIPELINE, patch_size=4).check_schedule(replace(SCHEDULE, steps=steps), ALL_FORWARDS)


@pytest.mark.parametrize(
    ("weights", "is_beside"), [((), False), (GRAPH.weights, True)], ids=["within the engines", "in a file"]
)
def test_weights_lie_beside_the_engines_if_any_of_them_reads_them_there(
    weights: tuple[WeightSpec, ...], is_beside: bool
) -> None:
    bare = {name: replace(e, graph=replace(e.graph, weights=())) for name, e in MANIFEST.engines.items()}
    deep = replace(bare["deep"], graph=replace(GRAPH, weights=weights))
    assert replace(MANIFEST, engines=bare | {"deep": deep}).uses_weight_file is is_beside


def test_the_solver_table_is_found_by_the_digest_of_the_scheduler() -> None:
    assert MANIFEST.solver_file(SCHEDULE.scheduler) == "solvers/DDIM-8.json"


def test_a_scheduler_without_a_solver_table_is_refused_with_both_sides() -> None:
    other = replace(SCHEDULE.scheduler, num_inference_steps=9)
    with pytest.raises(ScheduleError) as caught:
        MANIFEST.solver_file(other)
    assert "DDIM-9" in str(caught.value)
    assert "it has solvers/DDIM-8.json" in str(caught.value)
    assert "Export again" in str(caught.value)


def test_no_bit_of_a_manifest_can_change_unnoticed(tmp_path: Path) -> None:
    write_manifest(MANIFEST, tmp_path)
    data = (tmp_path / MANIFEST_FILE).read_bytes()
    for place in range(0, len(data), 7):
        (tmp_path / MANIFEST_FILE).write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        try:
            manifest = read_manifest(tmp_path)
        except BundleError:
            continue
        assert manifest == MANIFEST  # a space that became another
