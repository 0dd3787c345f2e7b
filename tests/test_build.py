from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given

from bundles import Made
from hemiola_engines import build
from hemiola_engines.build import build_bundle
from hemiola_engines.builder import EngineJob
from hemiola_engines.errors import BuildError
from hemiola_engines.layouts import arrange
from hemiola_engines.onnxruntime import ONNXRUNTIME_CUDA, OnnxRuntime
from hemiola_engines.options import BuildOptions, Layout
from hemiola_engines.parity import BOUNDS, check_parity
from hemiola_runtime.errors import BundleError, IntegrityError
from hemiola_runtime.graph_set import (
    REFERENCE_FILE,
    TOKENIZER_FILE,
    Graphs,
    GraphSet,
    read_graph_set,
    write_graph_set,
)
from hemiola_runtime.graphs import PRECISIONS, WEIGHTS_FILE
from hemiola_runtime.manifest import FileSpec, Manifest, read_manifest, write_manifest
from hemiola_runtime.pipeline import Pipeline
from hemiola_runtime.sampler import Sampler
from strategies import chains_of, examples, graph_specs, manifest_of, pipelines

# Relative L2 of final latents in float32: measured are 2e-7 with the digits and 1e-5 with random weights.
BOUND = 1e-4
FIVE: Final = BuildOptions("onnxruntime", 5)
TWO: Final = BuildOptions("onnxruntime", 2)


@pytest.fixture
def bundle(latent: Made, tmp_path: Path) -> Path:
    """A copy of a bundle, to be damaged."""
    return Path(shutil.copytree(latent.bundle, tmp_path / "bundle"))


def rebuild(latent: Made, out: Path) -> tuple[Manifest, list[str]]:
    told: list[str] = []
    return build_bundle(latent.graphs, out, FIVE, progress=told.append).manifest, told


def test_engines_compute_what_pytorch_computed(latent: Made, digits: Made, text: Made) -> None:
    for made in (latent, digits, text):
        parity = read_manifest(made.bundle).parity
        assert set(parity) == set(read_manifest(made.bundle).schedules)
        assert all(0 <= difference < BOUND for difference in parity.values())


def test_a_second_build_takes_every_engine_from_the_first(latent: Made, bundle: Path) -> None:
    before = read_manifest(bundle)
    manifest, told = rebuild(latent, bundle)
    assert [text for text in told if text.startswith("engine")] == [
        f"engine {name}: up to date" for name in before.engines
    ]
    assert manifest.files == before.files


def test_a_damaged_engine_is_built_again(latent: Made, bundle: Path) -> None:
    engine = bundle / "engines" / "reuse.onnx"
    engine.write_bytes(engine.read_bytes()[:-1])
    _, told = rebuild(latent, bundle)
    assert "engine reuse" in told
    assert "engine full: up to date" in told
    assert max(check_parity(bundle).values()) < BOUND


def test_a_changed_graph_is_refused_and_the_old_bundle_stays(latent: Made, bundle: Path, tmp_path: Path) -> None:
    graphs = Path(shutil.copytree(latent.graphs, tmp_path / "graphs"))
    (graphs / "fp32" / "full.onnx").write_bytes(b"no graph")
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    (bundle / "engines" / "full.onnx").unlink()  # else it would be taken from here
    with pytest.raises(BuildError, match="changed since it was exported"):
        build_bundle(graphs, bundle, TWO)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "graphs"}
    assert all(path.read_bytes() == data for path, data in before.items() if path.name != "full.onnx")


def test_the_tokenizer_of_a_model_that_draws_prompts_is_packed(text: Made, tmp_path: Path) -> None:
    assert (text.bundle / TOKENIZER_FILE).read_bytes() == (text.graphs / TOKENIZER_FILE).read_bytes()
    graphs = Path(shutil.copytree(text.graphs, tmp_path / "graphs"))
    (graphs / TOKENIZER_FILE).unlink()
    with pytest.raises(BuildError, match=r"tokenizer\.json is missing\. Export again"):
        build_bundle(graphs, tmp_path / "bundle", TWO)
    assert not (tmp_path / "bundle").exists()


def test_engines_that_differ_from_pytorch_are_refused(latent: Made, tmp_path: Path) -> None:
    graphs = Path(shutil.copytree(latent.graphs, tmp_path / "graphs"))
    with np.load(graphs / REFERENCE_FILE) as file:
        reference = dict(file)
    reference["latents.full"] = reference["latents.full"] * 1.01
    np.savez(graphs / REFERENCE_FILE, allow_pickle=False, **reference)
    with pytest.raises(BuildError, match=r"under the schedule full .* differ from PyTorch's by 9\.9e-03"):
        build_bundle(graphs, tmp_path / "bundle", TWO)
    assert not (tmp_path / "bundle").exists()


# layouts


@examples(30)
@given(pipeline=pipelines())
def test_a_separate_layout_has_an_engine_for_each_forward(pipeline: Pipeline) -> None:
    graphs = graph_specs(pipeline, has_decoder=True)
    chosen, forwards = arrange(graphs, "separate")
    assert chosen == {name: graph for name, graph in graphs.items() if name != "front"}
    assert forwards == chains_of(graphs, is_segmented=False)
    assert manifest_of(pipeline, graphs).forwards == forwards  # which a manifest takes


@examples(30)
@given(pipeline=pipelines().filter(lambda pipeline: pipeline.deep_start is not None))
def test_a_segmented_layout_has_front_and_deep_in_place_of_full(pipeline: Pipeline) -> None:
    graphs = graph_specs(pipeline, has_decoder=True)
    chosen, forwards = arrange(graphs, "segmented")
    assert chosen == {name: graph for name, graph in graphs.items() if name != "full"}
    assert forwards == chains_of(graphs, is_segmented=True)


def test_an_export_without_deep_steps_cannot_be_segmented(unguided: Made, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"no schedule of this export has deep steps\. Build with --layout separate"):
        build_bundle(unguided.graphs, tmp_path / "bundle", replace(TWO, layout="segmented"))
    assert list(tmp_path.iterdir()) == []


def test_a_segmented_bundle_draws_what_a_separate_one_draws(latent: Made, segmented: Made) -> None:
    separate, chained = read_manifest(latent.bundle), read_manifest(segmented.bundle)
    assert chained.forwards == separate.forwards | {"full": ("front", "deep")}
    assert set(chained.engines) == set(separate.engines) - {"full"} | {"front"}
    for name, difference in chained.parity.items():
        assert abs(difference - separate.parity[name]) < BOUND
    with Sampler.open(latent.bundle) as one, Sampler.open(segmented.bundle) as two:
        for name in one.schedules:
            expected = one.generate(labels=[1, 7], seeds=3, schedule=name).latents
            found = two.generate(labels=[1, 7], seeds=3, schedule=name).latents
            assert np.linalg.norm(found - expected) < BOUND * np.linalg.norm(expected)


def test_another_layout_takes_the_engines_that_both_have(latent: Made, bundle: Path) -> None:
    told: list[str] = []
    build_bundle(latent.graphs, bundle, replace(FIVE, layout="segmented"), progress=told.append)
    engines = [text for text in told if text.startswith("engine")]
    names = ("conditioning", "deep", "tokens", "reuse", "vae_decoder")
    assert engines == [
        *(f"engine {name}: up to date" for name in names),
        "engine front",
    ]
    assert not (bundle / "engines" / "full.onnx").exists()


# precisions and the comparison with PyTorch


def test_every_precision_has_a_bound_and_a_lower_one_a_wider() -> None:
    assert list(BOUNDS) == list(PRECISIONS)
    assert BOUNDS["fp32"] < BOUNDS["fp16"] < BOUNDS["bf16"]


@pytest.fixture
def graphs(latent: Made, tmp_path: Path) -> Path:
    """A copy of an export, whose description is to be changed."""
    return Path(shutil.copytree(latent.graphs, tmp_path / "graphs"))


def _describe(graphs: Path, **changes: Any) -> GraphSet:
    changed = replace(read_graph_set(graphs), **changes)
    write_graph_set(changed, graphs)
    return changed


def test_a_precision_that_was_not_exported_is_refused_with_those_that_were(graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"exported in fp32; bf16 was asked for\. Choose with --precision, or exp"):
        build_bundle(graphs, tmp_path / "bundle", replace(TWO, precision="bf16"))
    assert not (tmp_path / "bundle").exists()


def test_one_of_several_precisions_must_be_chosen(graphs: Path, tmp_path: Path) -> None:
    exported: Graphs = read_graph_set(graphs).precisions["fp32"]
    _describe(graphs, precisions={"bf16": exported, "fp32": exported})
    with pytest.raises(BuildError, match=r"exported in fp32, bf16; none was chosen\. Choose with --precision"):
        build_bundle(graphs, tmp_path / "bundle", TWO)
    assert build_bundle(graphs, tmp_path / "bundle", replace(TWO, precision="fp32")).manifest.precision == "fp32"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_precision_that_the_backend_does_not_run_is_refused(graphs: Path, tmp_path: Path, precision: Any) -> None:
    _describe(graphs, precisions={precision: read_graph_set(graphs).precisions["fp32"]})
    with pytest.raises(BuildError, match=rf"onnxruntime runs fp32, not {precision}\. Export in one of them"):
        build_bundle(graphs, tmp_path / "bundle", TWO)


@pytest.mark.parametrize(
    "options",
    [
        {"optimization_level": 0},
        {"timing_cache": Path("cache")},
        {"is_version_compatible": True},
        {"compute_capabilities": ("8.9",)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_tensorrt_are_refused_for_onnxruntime(graphs: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(BuildError, match="are TensorRT's; onnxruntime has none"):
        build_bundle(graphs, tmp_path / "bundle", replace(TWO, **options))
    assert not (tmp_path / "bundle").exists()


def test_graphs_of_another_format_are_refused_with_the_way_to_export_them(graphs: Path, tmp_path: Path) -> None:
    _describe(graphs, format="torch")
    with pytest.raises(BuildError, match=r"builds from onnx graphs, but .* holds torch graphs\. Export again with"):
        build_bundle(graphs, tmp_path / "bundle", TWO)


@pytest.mark.parametrize("layout", ["separate", "segmented"])
def test_without_reference_images_a_bundle_is_built_and_not_compared(
    graphs: Path, tmp_path: Path, layout: Layout
) -> None:
    _describe(graphs, has_reference=False)
    (graphs / REFERENCE_FILE).unlink()
    built = build_bundle(graphs, tmp_path / "bundle", replace(TWO, layout=layout))
    assert built.not_compared == "the export holds no reference images"
    assert built.manifest == read_manifest(tmp_path / "bundle")
    assert (built.manifest.parity, REFERENCE_FILE in built.manifest.files) == ({}, False)
    with Sampler.open(tmp_path / "bundle") as opened:
        assert opened.generate(labels=[1]).report.rhythm == "FCSDCS"


def test_a_bundle_that_was_compared_says_so(latent: Made, bundle: Path) -> None:
    built = build_bundle(latent.graphs, bundle, FIVE)
    assert built.not_compared is None
    assert built.manifest.parity.keys() == built.manifest.schedules.keys()


# what an opened bundle refuses


@pytest.mark.parametrize(
    "file", ["engines/full.onnx", f"engines/{WEIGHTS_FILE}", "schedules/mixed.json", REFERENCE_FILE]
)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_file_is_refused_by_name(bundle: Path, file: str, damage: str) -> None:
    path = bundle / file
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(IntegrityError, match=file):
        Sampler.open(bundle)


def test_a_link_that_leaves_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "full.onnx"
    shutil.move(bundle / "engines" / "full.onnx", outside)
    (bundle / "engines" / "full.onnx").symlink_to(outside)
    with pytest.raises(IntegrityError, match="is a link that leaves it"):
        Sampler.open(bundle)


def test_a_bundle_of_a_newer_backend_is_refused_with_both_versions(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    write_manifest(replace(manifest, backend=replace(manifest.backend, version="99.0.1")), bundle)
    with pytest.raises(BundleError, match=r"built with onnxruntime 99\.0\.1, but .* is installed"):
        Sampler.open(bundle)


def test_a_bundle_of_an_unknown_backend_is_refused(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    write_manifest(replace(manifest, backend=replace(manifest.backend, name="abacus")), bundle)
    with pytest.raises(BundleError, match="backend 'abacus'; this runtime has onnxruntime"):
        Sampler.open(bundle)


def test_an_engine_that_is_not_what_the_manifest_says_is_refused(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    full, reuse = manifest.engines["full"], manifest.engines["reuse"]
    swapped = replace(reuse, graph=replace(reuse.graph, file=full.graph.file))
    write_manifest(replace(manifest, engines={**manifest.engines, "reuse": swapped}), bundle)
    with pytest.raises(BundleError, match="`reuse` is not what the manifest says"):
        Sampler.open(bundle)


def test_a_file_that_onnxruntime_cannot_read_is_refused(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    data = b"this is no ONNX graph"
    (bundle / "engines" / "reuse.onnx").write_bytes(data)
    files = {**manifest.files, "engines/reuse.onnx": FileSpec(hashlib.sha256(data).hexdigest(), len(data))}
    write_manifest(replace(manifest, files=files), bundle)
    with pytest.raises(BundleError, match="refuses the engine `reuse`"):
        Sampler.open(bundle)


def test_onnxruntime_refuses_a_decoder_in_bfloat16_which_it_has_no_kernels_for(latent: Made, tmp_path: Path) -> None:
    graph = read_graph_set(latent.graphs).precisions["fp32"].graphs["vae_decoder"]
    half = replace(graph, weights=tuple(replace(weight, dtype="bfloat16") for weight in graph.weights))
    job = EngineJob(half, latent.graphs / graph.file, tmp_path / "vae_decoder.onnx", ())
    with pytest.raises(BuildError, match=r"no bfloat16 kernels for the norms of a VAE\. Export with --precision fp16"):
        ONNXRUNTIME_CUDA.build_engines([job], BuildOptions("onnxruntime_cuda", 1), print, rows_per_image=2)


@pytest.mark.parametrize("changed", ["RECIPE", "pinned timing cache"])
def test_engines_made_by_another_recipe_are_built_again(
    latent: Made, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    options = FIVE
    if changed == "RECIPE":
        monkeypatch.setattr(build, "RECIPE", build.RECIPE + 1)
    else:
        monkeypatch.setattr(OnnxRuntime, "check", lambda *_: None)  # it has no timing cache, and would say so
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "gpu.timing").write_bytes(b"measured")
        options = replace(FIVE, timing_cache=tmp_path / "cache", is_timing_cache_pinned=True)
    told: list[str] = []
    build_bundle(latent.graphs, bundle, options, progress=told.append)
    assert not [text for text in told if "up to date" in text]
