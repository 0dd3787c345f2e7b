from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bundles import Made
from hemiola_engines.build import build_bundle
from hemiola_engines.errors import BuildError
from hemiola_engines.parity import check_parity
from hemiola_runtime.errors import BundleError, IntegrityError
from hemiola_runtime.manifest import (
    REFERENCE_FILE,
    WEIGHTS_FILE,
    FileSpec,
    Manifest,
    read_manifest,
    write_manifest,
)
from hemiola_runtime.sampler import Sampler

# Relative L2 of final latents in float32: measured are 2e-7 with the digits and 1e-5 with random weights.
BOUND = 1e-4


@pytest.fixture
def bundle(latent: Made, tmp_path: Path) -> Path:
    """A copy of a bundle, to be damaged."""
    return Path(shutil.copytree(latent.bundle, tmp_path / "bundle"))


def rebuild(latent: Made, out: Path) -> tuple[Manifest, list[str]]:
    told: list[str] = []
    return build_bundle(latent.graphs, out, backend="onnxruntime", max_batch_size=5, progress=told.append), told


def test_engines_compute_what_pytorch_computed(latent: Made, digits: Made) -> None:
    for made in (latent, digits):
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
    (graphs / "full.onnx").write_bytes(b"no graph")
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    (bundle / "engines" / "full.onnx").unlink()  # else it would be taken from here
    with pytest.raises(BuildError, match="changed since it was exported"):
        build_bundle(graphs, bundle, backend="onnxruntime", max_batch_size=2)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "graphs"}
    assert all(path.read_bytes() == data for path, data in before.items() if path.name != "full.onnx")


def test_engines_that_differ_from_pytorch_are_refused(latent: Made, tmp_path: Path) -> None:
    graphs = Path(shutil.copytree(latent.graphs, tmp_path / "graphs"))
    with np.load(graphs / REFERENCE_FILE) as file:
        reference = dict(file)
    reference["latents.full"] = reference["latents.full"] * 1.01
    np.savez(graphs / REFERENCE_FILE, allow_pickle=False, **reference)
    with pytest.raises(BuildError, match=r"under the schedule full .* differ from PyTorch's by 9\.9e-03"):
        build_bundle(graphs, tmp_path / "bundle", backend="onnxruntime", max_batch_size=2)
    assert not (tmp_path / "bundle").exists()


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
