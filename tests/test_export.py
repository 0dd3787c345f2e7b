from __future__ import annotations

import filecmp
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import onnx
import pytest

from bundles import SELECTOR, Made, rebound, schedule_from_rhythm
from hemiola_export.errors import ExportError
from hemiola_export.export import export_pipeline
from hemiola_export.model import Model, load_model, make_scheduler, scheduler_from_identity
from hemiola_runtime.errors import ScheduleError
from hemiola_runtime.manifest import WEIGHTS_FILE, read_graph_set
from models import save_tiny_model, tiny_dit


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("small") / "model", has_vae=False)))


def test_every_weight_is_stored_once_for_all_graphs(digits: Made) -> None:
    graphs = read_graph_set(digits.graphs)
    model = load_model(str(digits.model))
    parameters = 4 * sum(weight.numel() for weight in model.transformer.state_dict().values())
    size = (digits.graphs / WEIGHTS_FILE).stat().st_size
    assert sum(weight.num_bytes for graph in graphs.graphs.values() for weight in graph.weights) > size
    assert abs(size / parameters - 1) < 0.01


def test_every_graph_passes_the_checker_and_names_its_dimensions(latent: Made) -> None:
    graphs = read_graph_set(latent.graphs)
    assert list(graphs.graphs) == ["conditioning", "full", "deep", "tokens", "reuse", "vae_decoder"]
    for name, graph in graphs.graphs.items():
        onnx.checker.check_model(latent.graphs / graph.file)
        proto = onnx.load(latent.graphs / graph.file, load_external_data=False)
        for declared, found in ((graph.inputs, proto.graph.input), (graph.outputs, proto.graph.output)):
            shapes = {
                value.name: tuple(side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim)
                for value in found
            }
            assert shapes == {spec.name: spec.shape for spec in declared}, name


def test_a_graph_tells_nothing_of_where_it_was_made(latent: Made) -> None:
    for graph in read_graph_set(latent.graphs).graphs.values():
        data = (latent.graphs / graph.file).read_bytes()
        assert b"/hemiola" not in data
        assert b"site-packages" not in data


def test_the_token_count_is_in_no_graph(latent: Made) -> None:
    """K comes from the length of an input, so that one engine serves every K."""
    proto = onnx.load(latent.graphs / "tokens.onnx", load_external_data=False)
    (top,) = [node for node in proto.graph.node if node.op_type == "TopK"]
    constants = {value.name for value in proto.graph.initializer} | {
        output for node in proto.graph.node if node.op_type == "Constant" for output in node.output
    }
    assert top.input[1] not in constants


def test_an_export_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    transformer = tiny_dit(num_blocks=1, channels=1, has_learned_sigma=False)
    small = load_model(str(save_tiny_model(tmp_path / "model", has_vae=False, transformer=transformer)))
    schedule = schedule_from_rhythm(small, small.scheduler, "FCF")
    for name in ("first", "second"):
        export_pipeline(small, {"short": schedule}, tmp_path / name)
    files = [path.name for path in (tmp_path / "first").iterdir() if path.suffix in (".onnx", ".bin")]
    same, different, missing = filecmp.cmpfiles(tmp_path / "first", tmp_path / "second", files, shallow=False)
    assert (sorted(same), different, missing) == (sorted(files), [], [])


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
