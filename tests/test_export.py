from __future__ import annotations

import filecmp
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from bundles import SELECTOR, Made, rebound, schedule_from_rhythm
from hemiola_export.conditioning import ForwardConfig
from hemiola_export.errors import ExportError
from hemiola_export.export import export_pipeline
from hemiola_export.forwards import Full
from hemiola_export.model import Model, load_model, make_scheduler, scheduler_from_identity
from hemiola_export.sizes import Sizes
from hemiola_runtime.errors import ScheduleError
from hemiola_runtime.graph_set import REFERENCE_FILE, read_graph_set
from hemiola_runtime.graphs import PRECISIONS, WEIGHTS_FILE, GraphSpec, Precision, WeightSpec
from models import save_tiny_model, tiny_dit


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("small") / "model", has_vae=False)))


def graphs_of(folder: Path, precision: Precision = "fp32") -> dict[str, GraphSpec]:
    return read_graph_set(folder).precisions[precision].graphs


def test_every_weight_is_stored_once_for_all_graphs(digits: Made) -> None:
    graphs = graphs_of(digits.graphs)
    model = load_model(str(digits.model))
    parameters = 4 * sum(weight.numel() for weight in model.family.parameters())
    size = (digits.graphs / "fp32" / WEIGHTS_FILE).stat().st_size
    assert sum(weight.num_bytes for graph in graphs.values() for weight in graph.weights) > size
    assert abs(size / parameters - 1) < 0.01


def test_the_weights_of_full_are_those_of_front_and_deep(latent: Made) -> None:
    def places(graph: GraphSpec) -> set[tuple[int, int]]:
        return {(weight.offset, weight.num_bytes) for weight in graph.weights}

    graphs = graphs_of(latent.graphs)
    assert places(graphs["front"]) | places(graphs["deep"]) == places(graphs["full"])
    shared = places(graphs["front"]) & places(graphs["deep"])
    embedding = 4 * (4 * 2 * 2 * 32 + 16 * 32)  # patches (C·p·p, D) and positions (N, D), which both begin with
    assert sum(size for _, size in shared) <= embedding


STEPS_AND_DECODER = ["conditioning", "full", "deep", "tokens", "reuse", "front", "vae_decoder"]


@pytest.mark.parametrize(
    ("fixture", "names"), [("latent", STEPS_AND_DECODER), ("text", ["text_encoder", *STEPS_AND_DECODER])]
)
def test_every_graph_passes_the_checker_and_names_its_dimensions(
    fixture: str, names: list[str], request: pytest.FixtureRequest
) -> None:
    made: Made = request.getfixturevalue(fixture)
    graphs = graphs_of(made.graphs)
    assert list(graphs) == names
    for name, graph in graphs.items():
        assert graph.file == f"fp32/{name}.onnx"
        onnx.checker.check_model(made.graphs / graph.file)
        proto = onnx.load(made.graphs / graph.file, load_external_data=False)
        for declared, found in ((graph.inputs, proto.graph.input), (graph.outputs, proto.graph.output)):
            shapes = {
                value.name: tuple(side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim)
                for value in found
            }
            assert shapes == {spec.name: spec.shape for spec in declared}, name


def test_only_where_pictures_differ_in_size_the_number_of_tokens_is_open(latent: Made, text: Made) -> None:
    sides = {
        made: {side for graph in graphs_of(made.graphs).values() for spec in graph.inputs for side in spec.shape}
        for made in (latent, text)
    }
    assert sides[text] & {"N", "rows", "columns"} == {"N", "rows", "columns"}
    assert not sides[latent] & {"N", "rows", "columns"}


def test_without_deep_steps_there_is_no_front(unguided: Made, digits: Made) -> None:
    assert list(graphs_of(unguided.graphs)) == ["conditioning", "full", "tokens", "reuse"]
    assert "front" not in graphs_of(digits.graphs)


def test_a_graph_tells_nothing_of_where_it_was_made(latent: Made) -> None:
    for graph in graphs_of(latent.graphs).values():
        data = (latent.graphs / graph.file).read_bytes()
        assert b"/hemiola" not in data
        assert b"site-packages" not in data


def test_the_token_count_is_in_no_graph(latent: Made) -> None:
    """K comes from the length of an input, so that one engine serves every K."""
    proto = onnx.load(latent.graphs / "fp32" / "tokens.onnx", load_external_data=False)
    (top,) = [node for node in proto.graph.node if node.op_type == "TopK"]
    constants = {value.name for value in proto.graph.initializer} | {
        output for node in proto.graph.node if node.op_type == "Constant" for output in node.output
    }
    assert top.input[1] not in constants


# precisions

HALVES = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


def casts_of(path: Path) -> set[int]:
    """Return the element types that a graph casts to."""
    proto = onnx.load(path, load_external_data=False)
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    return {
        attribute.i
        for node in nodes
        if node.op_type == "Cast"
        for attribute in node.attribute
        if attribute.name == "to"
    }


def test_graphs_in_float32_hold_nothing_of_half_precision(latent: Made) -> None:
    for graph in graphs_of(latent.graphs).values():
        proto = onnx.load(latent.graphs / graph.file, load_external_data=False)
        assert not casts_of(latent.graphs / graph.file) & set(HALVES.values()), graph.name
        assert not {value.data_type for value in proto.graph.initializer} & set(HALVES.values()), graph.name
        dtypes = [spec.dtype for spec in (*graph.inputs, *graph.outputs)] + [weight.dtype for weight in graph.weights]
        assert set(dtypes) <= {"float32", "int64"}


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of one block, whose graphs are quickly made."""
    transformer = tiny_dit(num_blocks=1, channels=1, has_learned_sigma=False)
    folder = tmp_path_factory.mktemp("smallest") / "model"
    return load_model(str(save_tiny_model(folder, has_vae=False, transformer=transformer)))


@pytest.fixture(scope="module")
def halves(smallest: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of two forwards in both half precisions, without reference images."""
    folder = tmp_path_factory.mktemp("halves") / "graphs"
    schedule = schedule_from_rhythm(smallest, smallest.scheduler, "FCF")
    export_pipeline(smallest, {"short": schedule}, folder, precisions=("fp16", "bf16", "fp16"), has_reference=False)
    return folder


def test_every_precision_has_a_folder_and_the_same_graphs(halves: Path) -> None:
    graph_set = read_graph_set(halves)
    assert list(graph_set.precisions) == ["fp16", "bf16"]
    for precision, part in graph_set.precisions.items():
        assert list(part.graphs) == ["conditioning", "full", "reuse"]
        files = {f"{precision}/{name}.onnx" for name in part.graphs} | {f"{precision}/{WEIGHTS_FILE}"}
        assert {path.relative_to(halves).as_posix() for path in (halves / precision).iterdir()} == files
    assert {path.name for path in halves.iterdir()} == {"fp16", "bf16", "graphs.json", "schedules", "solvers"}


def test_an_export_without_reference_images_says_so(halves: Path, latent: Made) -> None:
    assert not read_graph_set(halves).has_reference
    assert not (halves / REFERENCE_FILE).exists()
    assert read_graph_set(latent.graphs).has_reference
    assert (latent.graphs / REFERENCE_FILE).is_file()


@pytest.mark.parametrize("precision", HALVES)
def test_graphs_in_half_precision_have_caches_and_large_weights_in_it(halves: Path, precision: Precision) -> None:
    dtype = PRECISIONS[precision]
    for graph in graphs_of(halves, precision).values():
        onnx.checker.check_model(halves / graph.file)
        proto = onnx.load(halves / graph.file, load_external_data=False)
        for declared, found in ((graph.inputs, proto.graph.input), (graph.outputs, proto.graph.output)):
            halved = {value.name for value in found if value.type.tensor_type.elem_type == HALVES[precision]}
            assert halved == {spec.name for spec in declared if "_cache." in spec.name}
            assert halved == {spec.name for spec in declared if spec.dtype == dtype}
        stored = {value.name: value.data_type for value in proto.graph.initializer}
        assert all((stored[w.name] == HALVES[precision]) == (w.dtype == dtype) for w in graph.weights)


def test_half_precision_takes_half_the_bytes_of_blocks(smallest: Model, halves: Path) -> None:
    blocks = sum(weight.numel() for weight in smallest.family.blocks.parameters() if weight.ndim == 2)
    for precision in HALVES:
        graph = read_graph_set(halves).precisions[precision].graphs["full"]

        def is_half(weight: WeightSpec) -> bool:
            return weight.dtype in ("float16", "bfloat16")

        assert (
            sum(weight.num_bytes for weight in filter(is_half, graph.weights) if len(weight.shape) == 2) == 2 * blocks
        )


def test_a_graph_in_float16_computes_what_the_lowered_forward_does(smallest: Model, halves: Path) -> None:
    config = ForwardConfig(is_guided=True, state_rows=1)
    module = Full(smallest.family.lowered(torch.float16), config)
    sizes = {"B": 1, "R": 2}
    generator = np.random.default_rng(0)
    given = {spec.name: generator.standard_normal(spec.resolve(sizes), dtype=np.float32) for spec in module.inputs}
    session = ort.InferenceSession(halves / "fp16" / "full.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, given), strict=True))
    with torch.inference_mode():
        expected = module({name: torch.from_numpy(array) for name, array in given.items()})
    for name, tensor in expected.items():
        array = tensor.float().numpy()
        # ONNX Runtime rounds to float16 at other places: a few of its last bits, 5e-4 each
        assert np.linalg.norm(found[name].astype(np.float32) - array) < 5e-3 * np.linalg.norm(array), name


def test_an_export_is_the_same_byte_for_byte_with_whatever_it_is_exported(
    smallest: Model, halves: Path, tmp_path: Path
) -> None:
    schedule = schedule_from_rhythm(smallest, smallest.scheduler, "FCF")
    export_pipeline(smallest, {"again": schedule}, tmp_path / "graphs", precisions=("bf16",))
    files = [path.name for path in (halves / "bf16").iterdir()]
    assert len(files) == 4
    same, different, missing = filecmp.cmpfiles(halves / "bf16", tmp_path / "graphs" / "bf16", files, shallow=False)
    assert (sorted(same), different, missing) == (sorted(files), [], [])


# what is refused


def test_sizes_of_a_model_of_labels_are_refused(small: Model, tmp_path: Path) -> None:
    schedule = schedule_from_rhythm(small, small.scheduler, "FCF")
    with pytest.raises(ExportError, match="a model of the family dit draws pictures of one size"):
        export_pipeline(small, {"one": schedule}, tmp_path / "graphs", sizes=Sizes(largest=(16, 16)))
    assert list(tmp_path.iterdir()) == []


def test_tokens_by_a_prompt_are_refused_where_there_is_none(small: Model, tmp_path: Path) -> None:
    selector = replace(SELECTOR, score="cross_attention_entropy")
    schedule = schedule_from_rhythm(small, small.scheduler, "FCS", selector=selector)
    with pytest.raises(ExportError, match="needs cross-attention, which dit has not"):
        export_pipeline(small, {"entropy": schedule}, tmp_path / "graphs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights_sha256": "0" * 64}, "was made for the model .* but here is"),
        ({"latent_shape": (1, 16, 16)}, r"latents of shape \[1, 16, 16\], but here they are \[1, 8, 8\]"),
    ],
)
def test_a_schedule_for_something_else_is_refused(
    small: Model, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    schedule = rebound(schedule_from_rhythm(small, small.scheduler, "FCF"), **changes)
    with pytest.raises(ScheduleError, match=message):
        export_pipeline(small, {"other": schedule}, tmp_path / "graphs")
    assert list(tmp_path.iterdir()) == []


def test_schedules_that_cannot_share_a_bundle_are_refused(small: Model, tmp_path: Path) -> None:
    one = schedule_from_rhythm(small, small.scheduler, "FCS", deep_start=1)
    with pytest.raises(ExportError, match="deep_start is 1 in the one and 2 in the other"):
        export_pipeline(small, {"one": one, "two": replace(one, deep_start=2)}, tmp_path / "graphs")
    other = replace(one, selector=replace(SELECTOR, score="random"))
    with pytest.raises(ExportError, match="selector is"):
        export_pipeline(small, {"one": one, "two": other}, tmp_path / "graphs")


@pytest.mark.parametrize("name", ["full", "../evil", "a/b", "", ".hidden"])
def test_a_name_that_is_taken_or_none_is_refused(small: Model, tmp_path: Path, name: str) -> None:
    schedule = schedule_from_rhythm(small, small.scheduler, "FCF")
    with pytest.raises(ExportError, match=r"name of the uncached schedule|is no name for a schedule"):
        export_pipeline(small, {name: schedule}, tmp_path / "graphs")
    assert list(tmp_path.iterdir()) == []


def test_a_deep_start_behind_the_last_block_is_refused(small: Model, tmp_path: Path) -> None:
    schedule = schedule_from_rhythm(small, small.scheduler, "FDF", deep_start=5)
    with pytest.raises(ExportError, match="behind the last of the model's 4 blocks"):
        export_pipeline(small, {"deep": schedule}, tmp_path / "graphs")


def test_a_schedule_of_other_timesteps_is_refused(small: Model) -> None:
    schedule = schedule_from_rhythm(small, small.scheduler, "FCF")
    moved = replace(schedule.scheduler, timesteps=(999.0, 500.0, 1.0))
    with pytest.raises(ExportError, match="other timesteps"):
        scheduler_from_identity(moved)


def test_an_infinite_setting_of_a_scheduler_survives_the_schedule(small: Model) -> None:
    solver = make_scheduler(small, "dpm++2m", {})
    assert solver.config["lambda_min_clipped"] == -np.inf
    rebuilt = scheduler_from_identity(schedule_from_rhythm(small, solver, "FCF").scheduler)
    assert rebuilt.config["lambda_min_clipped"] == -np.inf


@pytest.mark.parametrize(("name", "options"), [("ddimm", {}), ("ddim", {"karras": True}), ("AutoencoderKL", {})])
def test_unknown_schedulers_and_options_are_refused(small: Model, name: str, options: dict[str, object]) -> None:
    with pytest.raises(ExportError, match=r"unknown scheduler|has no option karras"):
        make_scheduler(small, name, options)


def test_a_transformer_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", has_vae=False)
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace("DiTTransformer2DModel", "SD3Transformer2DModel"))
    with pytest.raises(ExportError, match="holds a SD3Transformer2DModel; Hemiola opens DiTTransformer2DModel"):
        load_model(str(folder))


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match="neither a folder nor a model"):
        load_model("no//such model")


def test_a_stochastic_scheduler_is_refused(small: Model) -> None:
    ancestral = diffusers.EulerAncestralDiscreteScheduler.from_config(small.scheduler.config)
    schedule = schedule_from_rhythm(small, ancestral, "FCF")
    with pytest.raises(ExportError, match="stochastic"):
        export_pipeline(small, {"random": schedule}, Path("unused"))
