from __future__ import annotations

import functools
import json
import logging
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import onnx
import pytest
import torch

from bundles import DIGITS, SELECTOR, schedule_from_rhythm
from gpu_bundles import install_driver, install_gpu
from hemiola_engines.errors import BuildError
from hemiola_engines.options import BuildOptions
from hemiola_engines.profiles import profiles_of
from hemiola_engines.tensorrt import CHILD, TENSORRT, TENSORRT_RTX, Countdown, TensorRT
from hemiola_engines.tensorrt_child import VERBOSE, Request
from hemiola_export import architectures
from hemiola_export.architectures import PIXART_XL_2
from hemiola_export.conditioning import Conditioning, ForwardConfig
from hemiola_export.export import export_pipeline
from hemiola_export.forwards import FORWARDS as BY_FORWARD
from hemiola_export.forwards import Deep, Front, Full, Reuse
from hemiola_export.model import Model, load_model
from hemiola_export.named_module import NamedModule
from hemiola_export.onnx_graphs import export_graph
from hemiola_export.sizes import Sizes
from hemiola_export.token_forward import Tokens
from hemiola_export.weight_file import WeightFile
from hemiola_runtime.artifacts import sha256_of
from hemiola_runtime.codec import encode
from hemiola_runtime.graph_set import GraphSet
from hemiola_runtime.graphs import WEIGHTS_FILE, GraphSpec, Precision, TensorSpec
from hemiola_runtime.manifest import Profile
from hemiola_runtime.schedule import Forward, Schedule
from models import save_tiny_text_model, tiny_pixart

pytest.importorskip("tensorrt_rtx")

FORWARDS: Final[dict[str, type]] = {
    "conditioning": Conditioning,
    "full": Full,
    "front": Front,
    "deep": Deep,
    "tokens": Tokens,
    "reuse": Reuse,
}
TEXT_GRAPHS: Final = ("text_encoder", *FORWARDS, "vae_decoder")  # of a model that draws prompts
SIDES_OF: Final[dict[str, set[str]]] = {  # that differ from request to request where pictures differ in size
    "text_encoder": set(),
    "conditioning": {"B", "T", "N"},
    "tokens": {"B", "K", "N"},
    "vae_decoder": {"B", "rows", "columns"},
}
PRECISIONS: Final[tuple[Precision, ...]] = ("fp16", "bf16")
SIDES: Final = {"B": (1, 2, 4), "K": (4, 16, 64), "T": (1, 5, 10)}  # 64 is all tokens
OPTIONS: Final = BuildOptions(backend="tensorrt_rtx", max_batch_size=4)
FUSED_ATTENTION: Final = b"_gemm_mha_v2"  # a kernel's name: TensorRT-RTX engines hold sources
SOFTMAX: Final = b"MaxrSubExpSumDiv"  # a softmax of its own, as float32 has it
CAPABILITY_BITS: Final = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # of the mask at byte 32 of an engine's header

Exported = tuple[Path, dict[str, GraphSpec]]  # a folder and the graphs in it, by name
Built = Callable[[str, str], bytes]  # from precision and name of a graph to its engine


def export(folder: Path, dtype: torch.dtype) -> Exported:
    """Export the forwards of the digits model, its deepest quarter deep."""
    family = load_model(str(DIGITS)).family.lowered(dtype)
    config = ForwardConfig(is_guided=True, state_rows=2, deep_start=9, selector=SELECTOR)
    with (folder / WEIGHTS_FILE).open("wb") as file:
        weights = WeightFile(file)
        graphs = {}
        for name, forward in FORWARDS.items():
            module: NamedModule = forward(family, config)
            graphs[name] = export_graph(
                module, name=name, rows_per_image=2, activation_bytes_per_row=0, folder=folder, weights=weights
            )
    return folder, graphs


def profile_of(graph: GraphSpec, sides: dict[str, tuple[int, int, int]] = SIDES) -> Profile:
    symbols = {side for spec in graph.inputs for side in spec.shape if isinstance(side, str)}
    return Profile({symbol: side for symbol, side in sides.items() if symbol in symbols or symbol == "B"})


def build(
    graph: GraphSpec,
    folder: Path,
    target: Path,
    *profiles: Profile,
    builder: TensorRT = TENSORRT_RTX,
    options: BuildOptions = OPTIONS,
    progress: Callable[[str], None] = lambda _: None,
) -> bytes:
    profiles = profiles or (profile_of(graph),)
    builder.build_engine(graph, folder / graph.file, target, profiles, options, progress, rows_per_image=2)
    return target.read_bytes()


def capabilities_of(engine: bytes) -> set[str]:
    (mask,) = struct.unpack_from("<I", engine, 32)
    return {capability for bit, capability in enumerate(CAPABILITY_BITS) if mask >> bit & 1}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """All graphs of the digits model in each precision."""
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    return {precision: export(tmp_path_factory.mktemp(precision), dtype) for precision, dtype in dtypes.items()}


@pytest.fixture(scope="module")
def built(exported: dict[str, Exported], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Return the engine of a graph in a precision, built when it is first asked for."""

    @functools.cache
    def get(precision: str, name: str) -> bytes:
        folder, graphs = exported[precision]
        return build(graphs[name], folder, tmp_path_factory.mktemp("engine") / f"{name}.engine")

    return get


@pytest.fixture
def reuse(exported: dict[str, Exported]) -> tuple[GraphSpec, Path]:
    """The smallest graph and its folder."""
    folder, graphs = exported["fp16"]
    return graphs["reuse"], folder


def child_that(script: str) -> TensorRT:
    """The builder with a child that runs a script instead of building."""
    return replace(TENSORRT_RTX, child=(sys.executable, "-c", f"import os, signal, sys, time\n{script}"))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FORWARDS)
def test_every_graph_builds_without_a_warning(
    built: Built, precision: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(built(precision, name)) > 0
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "is_fused"), [("full", True), ("front", True), ("deep", True), ("reuse", False)])
def test_attention_is_fused_where_it_is_computed(built: Built, precision: str, name: str, is_fused: bool) -> None:
    assert (FUSED_ATTENTION in built(precision, name)) is is_fused


@dataclass(frozen=True, slots=True)
class TextExport:
    """An export of a model that draws prompts, and the schedule that it was made for."""

    folder: Path
    graph_set: GraphSet
    schedule: Schedule

    @property
    def exported(self) -> dict[str, Exported]:
        return {precision: (self.folder, part.graphs) for precision, part in self.graph_set.precisions.items()}

    def profiles(self, graph: GraphSpec) -> tuple[Profile, ...]:
        return profiles_of(graph, self.graph_set.pipeline, [self.schedule], OPTIONS.max_batch_size)


def export_text_model(folder: Path, model: Model, precisions: Sequence[Precision], sizes: Sizes | None) -> TextExport:
    """Export every graph that a model of two blocks can have; a quarter of the tokens is selected."""
    selector = replace(SELECTOR, score="cross_attention_entropy")
    num_tokens = model.family.num_tokens // 4
    schedule = schedule_from_rhythm(
        model, model.scheduler, "FSDC", num_tokens=num_tokens, deep_start=1, selector=selector
    )
    made = export_pipeline(model, {"mixed": schedule}, folder, precisions=precisions, sizes=sizes, has_reference=False)
    return TextExport(folder, made, schedule)


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> TextExport:
    """Two blocks of PixArt-XL/2 at 512 × 512 pixels; a small T5 and a small VAE of the same layers."""
    with pytest.MonkeyPatch.context() as patch:
        blocks = PIXART_XL_2 | {"num_layers": 2, "caption_channels": 128}
        patch.setitem(architectures.ARCHITECTURES, "two-blocks", blocks)
        for name, value in {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_heads": 4}.items():
            patch.setitem(architectures.T5_XXL, name, value)
        patch.setitem(architectures.VAE, "block_out_channels", (32, 32, 64, 64))
        model = architectures.random_model("two-blocks")
    return export_text_model(tmp_path_factory.mktemp("pixart") / "graphs", model, PRECISIONS, None)


@pytest.fixture(scope="module")
def of_sizes(tmp_path_factory: pytest.TempPathFactory) -> TextExport:
    """A tiny PixArt with heads of PixArt's width, for pictures of 8 to 24 pixels."""
    folder = tmp_path_factory.mktemp("of_sizes")
    save_tiny_text_model(folder / "model", transformer=tiny_pixart(num_blocks=2, num_heads=2, head_width=72))
    model = load_model(str(folder / "model"))
    return export_text_model(folder / "graphs", model, ["bf16"], Sizes((8, 8), (24, 24), 16))


@pytest.fixture(scope="module")
def built_pixart(pixart: TextExport, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """As `built`, of `pixart`."""

    @functools.cache
    def get(precision: str, name: str) -> bytes:
        folder, graphs = pixart.exported[precision]
        graph = graphs[name]
        target = tmp_path_factory.mktemp("engine") / f"{name}.engine"
        return build(graph, folder, target, *pixart.profiles(graph))

    return get


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", TEXT_GRAPHS)
def test_every_graph_of_a_model_that_draws_prompts_builds_without_a_warning(
    built_pixart: Built, precision: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(built_pixart(precision, name)) > 0
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "count"), [("full", 4), ("front", 2), ("deep", 2), ("reuse", 0)])
def test_self_attention_and_masked_cross_attention_are_fused(
    built_pixart: Built, precision: str, name: str, count: int
) -> None:
    """`tokens` has one attention, the second block's to the prompt; the kernels of each stand in an engine as often."""
    one = built_pixart(precision, "tokens").count(FUSED_ATTENTION)
    assert one > 0
    assert built_pixart(precision, name).count(FUSED_ATTENTION) == count * one


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "has_softmax"), [("front", False), ("tokens", False), ("deep", True)])
def test_only_scores_of_tokens_take_a_softmax_of_their_own(
    built_pixart: Built, precision: str, name: str, has_softmax: bool
) -> None:
    assert (SOFTMAX in built_pixart(precision, name)) is has_softmax


@pytest.mark.parametrize("name", TEXT_GRAPHS)
def test_every_graph_builds_for_many_sizes_of_pictures(
    of_sizes: TextExport, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, graphs = of_sizes.exported["bf16"]
    profiles = of_sizes.profiles(graphs[name])
    sides = {symbol for profile in profiles for symbol in profile.sides}
    assert sides == SIDES_OF.get(name, {"B", "N"})
    engine = build(graphs[name], folder, tmp_path / f"{name}.engine", *profiles)
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []
    assert FUSED_ATTENTION in engine or name not in {"full", "front", "deep", "tokens"}


# forecasts, masks and token counts of blocks

FORECASTS: Final = ("reuse_1", "reuse_2", "tokens", "deep_1", "masked")
OF_BLOCKS: Final = {f"K.mlp.{block}": (2, 16, 64) for block in (9, 10, 11)}


@pytest.fixture(scope="module")
def forecasting(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Graphs of the digits model that forecast, compute what a mask says, or count tokens of each block."""
    family = load_model(str(DIGITS)).family.lowered(torch.bfloat16)
    mask = tuple("".join(letters[i % 2] for i in range(len(family.blocks))) for letters in ("x.", ".x"))
    config = ForwardConfig(
        is_guided=True, state_rows=2, deep_start=9, selector=SELECTOR, mask=mask, has_block_counts=True
    )
    folder, graphs = tmp_path_factory.mktemp("forecasting"), {}
    with (folder / WEIGHTS_FILE).open("wb") as file:
        weights = WeightFile(file)
        for name in FORECASTS:
            forward, _, order = name.partition("_")
            module = BY_FORWARD[Forward(forward)](family, config, int(order or 0))
            graphs[name] = export_graph(
                module, name=name, rows_per_image=2, activation_bytes_per_row=0, folder=folder, weights=weights
            )
    return folder, graphs


@pytest.mark.parametrize("name", FORECASTS)
def test_every_graph_that_forecasts_builds_without_a_warning(
    forecasting: Exported, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, graphs = forecasting
    profile = profile_of(graphs[name], SIDES | OF_BLOCKS)
    assert (profile.sides.keys() >= OF_BLOCKS.keys()) is name.startswith("tokens")
    engine = build(graphs[name], folder, tmp_path / f"{name}.engine", profile)
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []
    assert (FUSED_ATTENTION in engine) is name.startswith(("deep", "masked"))


@pytest.fixture(scope="module")
def forecasting_of_sizes(tmp_path_factory: pytest.TempPathFactory) -> TextExport:
    """As `of_sizes`, with counts for cross-attention and MLP of the deep block, forecasts and a mask."""
    folder = tmp_path_factory.mktemp("forecasting_of_sizes")
    save_tiny_text_model(folder / "model", transformer=tiny_pixart(num_blocks=2, num_heads=2, head_width=72))
    model = load_model(str(folder / "model"))
    schedule = schedule_from_rhythm(model, model.scheduler, "FF1sm", num_tokens=((3,), (9,)), deep_start=1)
    sizes = Sizes((8, 8), (24, 24), 16)
    made = export_pipeline(
        model, {"forecasting": schedule}, folder / "graphs", precisions=["bf16"], sizes=sizes, has_reference=False
    )
    return TextExport(folder / "graphs", made, schedule)


@pytest.mark.parametrize("name", ["full", "reuse_1", "tokens_1", "masked_1"])
def test_every_graph_that_forecasts_builds_for_many_sizes_of_pictures(
    forecasting_of_sizes: TextExport, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, graphs = forecasting_of_sizes.exported["bf16"]
    profiles = forecasting_of_sizes.profiles(graphs[name])
    counts = {"K", "K.cross.1", "K.mlp.1"} if name == "tokens_1" else set()
    assert {symbol for profile in profiles for symbol in profile.sides} == {"B", "N"} | counts
    build(graphs[name], folder, tmp_path / f"{name}.engine", *profiles)
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []


def copies_of_block_weights(exported: Exported, name: str, *engines: bytes) -> set[int]:
    """Count how often the weights of blocks that a graph has stand in engines; the first 96 bytes tell each apart."""
    folder, graphs = exported
    data = (folder / WEIGHTS_FILE).read_bytes()
    large = [spec for spec in graphs[name].weights if len(spec.shape) == 2 and spec.dtype != "float32"]
    assert large
    return {sum(engine.count(data[spec.offset : spec.offset + 96]) for engine in engines) for spec in large}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_weight_of_a_block_is_in_each_engine_once_and_in_the_segmented_layout_once_in_all(
    exported: dict[str, Exported], built: Built, precision: str
) -> None:
    for name in ("full", "front", "deep", "tokens"):
        assert copies_of_block_weights(exported[precision], name, built(precision, name)) == {1}
    segments = built(precision, "front"), built(precision, "deep")
    assert copies_of_block_weights(exported[precision], "full", *segments) == {1}


def test_more_profiles_store_no_weight_again(exported: dict[str, Exported], tmp_path: Path) -> None:
    folder, graphs = exported["fp16"]
    profiles = [profile_of(graphs["deep"]), profile_of(graphs["deep"], {"B": (8, 8, 8)})]
    engine = build(graphs["deep"], folder, tmp_path / "deep.engine", *profiles)
    assert copies_of_block_weights(exported["fp16"], "deep", engine) == {1}


def test_profiles_hold_the_shapes_that_their_sides_mean(
    exported: dict[str, Exported], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, graphs = exported["fp16"]
    graph = graphs["tokens"]
    single = profile_of(graph, {"B": (1, 1, 1), "K": (2, 3, 4)})
    with caplog.at_level(VERBOSE, logger="hemiola_engines.tensorrt"):
        build(graph, folder, tmp_path / "tokens.engine", profile_of(graph), single)
    listed = re.findall(r"Name: (\S+), IOMode: Input, .* ProfileInfo: \[(.*)\]", caplog.text)
    shapes = {name: re.findall(r"(?:Min|Opt|Max)Shape: \[([\d,]*)\]", ranges) for name, ranges in listed}
    assert shapes["token_slots"] == ["4", "16", "64", "2", "3", "4"]
    assert shapes["scores"] == ["3,1,64", "3,2,64", "3,4,64"] + ["3,1,64"] * 3
    assert shapes["mlp_cache.0"] == ["2,64,128", "4,64,128", "8,64,128"] + ["2,64,128"] * 3  # R = 2B


def test_an_engine_runs_on_the_capabilities_that_the_target_names(
    built: Built, reuse: tuple[GraphSpec, Path], tmp_path: Path
) -> None:
    assert TENSORRT_RTX.target(OPTIONS) == (None, ("8.0", "8.6", "8.9", "12.0", "12.1"))
    assert capabilities_of(built("fp16", "reuse")) == set(TENSORRT_RTX.target(OPTIONS)[1])
    some = replace(OPTIONS, compute_capabilities=("8.6", "12.0"))
    assert TENSORRT_RTX.target(some) == (None, ("8.6", "12.0"))
    assert capabilities_of(build(*reuse, tmp_path / "reuse.engine", options=some)) == {"8.6", "12.0"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute_capabilities": ("sm_89",)}, "for compute capability 'sm_89', only for 8.0, 8.6, 8.9, 12.0, 12.1"),
        ({"timing_cache": Path("cache")}, "TensorRT-RTX times nothing when it builds.* Leave out --timing-cache"),
        ({"is_timing_cache_pinned": True}, "TensorRT-RTX times nothing when it builds.*and --pin-timing-cache"),
        ({"compute_capabilities": ("8.9", "7.5")}, "not build these graphs for compute capability '7.5', only for 8.0"),
        ({"is_version_compatible": True}, "run with the version that built them alone.*--backend tensorrt"),
        ({"optimization_level": 6}, "optimization level is 0 to 5, not 6"),
    ],
)
def test_options_that_cannot_be_met_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        TENSORRT_RTX.check(replace(OPTIONS, **changes), "fp16")


def test_a_capability_that_the_library_does_not_know_is_refused_with_those_it_does(
    reuse: tuple[GraphSpec, Path], tmp_path: Path
) -> None:
    options = replace(OPTIONS, compute_capabilities=("8.9", "9.0"))
    with pytest.raises(BuildError, match=r"not build for compute capability 9\.0, only for .*8\.9.*12\.0"):
        build(*reuse, tmp_path / "reuse.engine", options=options)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_is_missing_or_changed_is_refused(reuse: tuple[GraphSpec, Path], tmp_path: Path) -> None:
    graph, folder = reuse
    for changed in (replace(graph, file="gone.onnx"), replace(graph, sha256="0" * 64)):
        with pytest.raises(BuildError, match="is missing, or was changed since it was exported"):
            build(changed, folder, tmp_path / "reuse.engine")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_graph_is_refused(reuse: tuple[GraphSpec, Path], tmp_path: Path) -> None:
    """TensorRT-RTX's parser is content with this text, and finds nothing in it."""
    data = b"this is no graph"
    (tmp_path / "reuse.onnx").write_bytes(data)
    with pytest.raises(BuildError, match=r"engine `reuse`: .* should have the inputs state float32, .* but has none"):
        build(replace(reuse[0], sha256=sha256_of(data)), tmp_path, tmp_path / "reuse.engine")
    assert [path.name for path in tmp_path.iterdir()] == ["reuse.onnx"]


def test_an_operator_that_the_parser_does_not_know_is_named(tmp_path: Path) -> None:
    node = onnx.helper.make_node("NonZero", ["x"], ["y"], name="find")
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [1, None])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "nonzero", [x], [y]))
    data = model.SerializeToString()
    (tmp_path / "nonzero.onnx").write_bytes(data)
    graph = GraphSpec("nonzero", "nonzero.onnx", sha256_of(data), (TensorSpec("x", "float32", (4,)),), (), (), 0)
    with pytest.raises(BuildError, match=r"the parser refuses .*nonzero\.onnx: node 0 \(find, NonZero\): \w+"):
        build(graph, tmp_path, tmp_path / "nonzero.engine")


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        (SIDES | {"K": (4, 16, 80)}, "sizes do not fit the network: .*reduction axis .64. is smaller than K"),
        ({"B": (1, 2, 4)}, "a profile of the engine `tokens` says nothing of K"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(
    exported: dict[str, Exported],
    tmp_path: Path,
    sides: dict[str, tuple[int, int, int]],
    message: str,
) -> None:
    folder, graphs = exported["fp16"]
    with pytest.raises(BuildError, match=message):
        build(graphs["tokens"], folder, tmp_path / "tokens.engine", profile_of(graphs["tokens"], sides))
    assert list(tmp_path.iterdir()) == []


TELL_PROGRESS: Final = """
print('{"kind":"progress","text":"","level":0,"fraction":0.1,"seconds":1.0,"peak_bytes":5000000000}', flush=True)
"""
DIE: Final = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            TELL_PROGRESS + DIE,
            r"killed, most likely for want of memory; the largest .* was 5\.0 GB\. Close other programs",
        ),
        (DIE, "killed, most likely for want of memory. Close other programs"),
        ("os.abort()", r"crashed \(SIGABRT\) without a reason"),
        ("sys.exit(3)", "ended with status 3 without a reason$"),
        ("print('garbage')", "ended with status 0 without a reason; the last it wrote was: garbage"),
        ("sys.stderr.write('first\\nsecond\\n'); sys.exit(1)", "status 1 .* the last it wrote was: first / second"),
    ],
)
def test_a_child_that_dies_is_an_error_that_says_how(
    reuse: tuple[GraphSpec, Path], tmp_path: Path, script: str, message: str
) -> None:
    with pytest.raises(
        BuildError, match=f"TensorRT-RTX cannot build the engine `reuse`: the building process .*{message}"
    ):
        build(*reuse, tmp_path / "reuse.engine", builder=child_that(script))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_leaves_the_engine_that_was_there(reuse: tuple[GraphSpec, Path], tmp_path: Path) -> None:
    (tmp_path / "reuse.engine").write_bytes(b"before")
    told: list[str] = []
    with pytest.raises(BuildError):
        build(*reuse, tmp_path / "reuse.engine", builder=child_that(TELL_PROGRESS + DIE), progress=told.append)
    assert told == ["engine reuse: 1 s so far"]
    assert (tmp_path / "reuse.engine").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interruption_ends_the_child_and_leaves_no_file(reuse: tuple[GraphSpec, Path], tmp_path: Path) -> None:
    pid = tmp_path / "pid"

    def interrupt() -> None:
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    (tmp_path / "out").mkdir()
    builder = child_that(f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    with pytest.raises(KeyboardInterrupt):
        build(*reuse, tmp_path / "out" / "reuse.engine", builder=builder)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_child_without_a_parent_stops(reuse: tuple[GraphSpec, Path], tmp_path: Path) -> None:
    graph, folder = reuse
    shapes = {spec.name: spec.resolve({"B": 1, "R": 2}) for spec in graph.inputs}
    request = Request(
        source=str(folder / graph.file),
        target=str(tmp_path / "reuse.engine"),
        inputs=graph.inputs,
        outputs=graph.outputs,
        profiles=({name: (shape, shape, shape) for name, shape in shapes.items()},),
        optimization_level=None,
        timing_cache=None,
        is_timing_cache_pinned=False,
        is_version_compatible=False,
        compute_capabilities=(),
        level=logging.ERROR,
    )
    line = json.dumps(encode(request)) + "\n"  # and then the input ends
    said = subprocess.run((*CHILD, "tensorrt_rtx"), input=line, capture_output=True, text=True, check=False, timeout=20)
    assert said.returncode == 1
    assert "BuildCanceled" in said.stdout
    assert list(tmp_path.iterdir()) == []


def test_progress_never_goes_back() -> None:
    countdown = Countdown()
    reports = [(0.4, 1.0), (0.4, 2.0), (0.5, 3.0), (0.5, 9.0), (0.68, 10.0), (0.8, 11.0), (0.8, 90.0)]
    texts = [countdown.text(fraction, seconds) for fraction, seconds in reports]
    assert texts[:3] == ["1 s so far", "2 s so far", "23 %, about 10 s left"]  # 0.1 took 2 s, so 0.5 takes 10
    shares = [int(text.split(" %")[0]) for text in texts[2:]]
    assert shares == sorted(shares)
    assert shares[-1] == 99


def test_a_library_that_is_not_installed_is_named_with_its_command(
    reuse: tuple[GraphSpec, Path], tmp_path: Path
) -> None:
    missing = replace(TENSORRT, distributions=("no-such-tensorrt",))
    with pytest.raises(BuildError, match=r"TensorRT is not installed\. .* pip install 'hemiola\[tensorrt\]'"):
        build(*reuse, tmp_path / "reuse.engine", builder=missing)
    unimportable = replace(TENSORRT_RTX, module="no_such_module")
    with pytest.raises(BuildError, match="no_such_module is installed but cannot be imported"):
        build(*reuse, tmp_path / "reuse.engine", builder=unimportable)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", TENSORRT_RTX.version())


# TensorRT itself needs a GPU. TensorRT-RTX stands in for it here, taken for a library that builds for the GPU at hand.
STAND_IN: Final = replace(TENSORRT_RTX, portable_to=())


def test_without_a_gpu_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(monkeypatch, lambda _: SimpleNamespace(cuInit=lambda _: 100))
    with pytest.raises(
        BuildError, match=r"for the GPU at hand, but the NVIDIA driver sees no GPU.*--backend tensorrt_rtx"
    ):
        TENSORRT.target(OPTIONS)


def test_the_timing_cache_has_a_file_for_each_gpu_and_version(
    reuse: tuple[GraphSpec, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_gpu(monkeypatch, gpu_name="NVIDIA H200", compute_capability=(9, 0))
    options = replace(OPTIONS, timing_cache=tmp_path / "cache")
    pinned = replace(options, is_timing_cache_pinned=True)
    assert STAND_IN.target(options) == ("NVIDIA H200", ("9.0",))
    with pytest.raises(BuildError, match=r"pinned timing cache has no .*NVIDIA-H200-9\.0\.timing.*--pin-timing-cache"):
        build(*reuse, tmp_path / "reuse.engine", builder=STAND_IN, options=pinned)
    build(*reuse, tmp_path / "reuse.engine", builder=STAND_IN, options=options)
    (cache,) = (tmp_path / "cache").iterdir()
    assert cache.name == f"tensorrt_rtx-{STAND_IN.version()}-NVIDIA-H200-9.0.timing"
    before = cache.stat().st_mtime_ns
    build(*reuse, tmp_path / "reuse.engine", builder=STAND_IN, options=pinned)
    assert cache.stat().st_mtime_ns == before


def test_tensorrt_takes_no_list_of_capabilities() -> None:
    with pytest.raises(BuildError, match="builds for the GPU at hand alone"):
        TENSORRT.check(replace(OPTIONS, compute_capabilities=("8.9",)), "bf16")


def test_a_pinned_timing_cache_needs_a_folder() -> None:
    with pytest.raises(BuildError, match=r"no timing cache to pin\. Name its folder with --timing-cache"):
        TENSORRT.check(replace(OPTIONS, is_timing_cache_pinned=True), "bf16")
