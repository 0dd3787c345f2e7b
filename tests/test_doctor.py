from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from bundles import Made
from gpu_bundles import RTX, FakeBuilder, install_driver, install_gpu, install_library
from hemiola.cli import main
from hemiola.commands.doctor import Examined, examine
from hemiola_engines.build import BUILDERS
from hemiola_runtime import bench
from hemiola_runtime.backends import BACKENDS, tensorrt
from hemiola_runtime.manifest import read_manifest, write_manifest


@pytest.fixture(autouse=True)
def _no_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "gpu_state", dict)


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(monkeypatch, _no_library)


def _no_library(name: str) -> NoReturn:
    raise OSError(name)


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["doctor"]) == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("no_driver")
def test_a_machine_without_a_gpu_hears_why_and_serves_on_its_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    said = _said(capsys)
    assert "GPU: none that can be used: this machine has no NVIDIA driver (libcuda.so.1 is not found)\n" in said
    assert "backend onnxruntime: builds here and runs here (" in said
    assert said.count("\nbackend ") == len(BACKENDS)


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install_gpu(monkeypatch, gpu_name="NVIDIA H200", compute_capability=(9, 0), total_bytes=150_000_000_000)
    monkeypatch.setattr(bench, "gpu_state", lambda: {"driver_version": "580.95.05"})
    expected = "GPU: NVIDIA H200, compute capability 9.0, 150.0 GB, driver 580.95.05, which knows CUDA 13.5\n"
    assert expected in _said(capsys)


def test_a_driver_that_does_not_start_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_driver(monkeypatch, lambda _: SimpleNamespace(cuInit=lambda _: 999))
    assert "GPU: none that can be used: the NVIDIA driver does not start (cuInit gives 999)" in _said(capsys)


def test_a_backend_that_builds_and_runs_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    install_library(monkeypatch, install_gpu(monkeypatch))
    monkeypatch.setitem(BUILDERS, "tensorrt", FakeBuilder())
    assert str(examine("tensorrt")) == "backend tensorrt: builds here and runs here (11.4.0)"
    tensorrt._listeners.cache_clear()


def test_the_lean_runtime_runs_what_it_cannot_build(monkeypatch: pytest.MonkeyPatch) -> None:
    install_library(monkeypatch, install_gpu(monkeypatch), "tensorrt_lean")
    found = examine("tensorrt")  # the wheel `tensorrt` is not installed
    assert str(found).splitlines() == [
        "backend tensorrt: does not build here but runs here",
        "  to build: TensorRT is not installed. Install it with: pip install 'hemiola[tensorrt]'",
    ]
    tensorrt._listeners.cache_clear()


def test_engines_for_other_gpus_do_not_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = install_gpu(monkeypatch, gpu_name="NVIDIA H200", compute_capability=(9, 0))
    install_library(monkeypatch, gpu, "tensorrt_rtx")
    monkeypatch.setitem(BUILDERS, "tensorrt_rtx", RTX)
    found = examine("tensorrt_rtx")
    assert found.build_obstacle is None
    assert found.run_obstacle == (
        "the engines were built for compute capability 8.6, 8.9, but this is NVIDIA H200 (compute capability 9.0)"
    )
    tensorrt._listeners.cache_clear()


@pytest.mark.usefixtures("no_driver")
def test_no_library_of_a_gpu_is_touched_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorrt", "tensorrt_lean"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    touched: list[str] = []
    monkeypatch.setattr("importlib.import_module", _noting(touched))
    found = examine("tensorrt")
    assert found.run_obstacle == "this machine has no NVIDIA driver (libcuda.so.1 is not found)"
    assert not {"tensorrt", "tensorrt_lean"} & set(touched)


def _noting(touched: list[str]) -> Callable[[str], Any]:
    import importlib

    original = importlib.import_module

    def import_module(name: str, package: str | None = None) -> Any:
        touched.append(name)
        return original(name, package)

    return import_module


class BrokenBuilder(FakeBuilder):
    def version(self) -> str:
        raise OSError("libnvinfer.so.11: cannot open shared object file")


def test_a_broken_library_is_told_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpu(monkeypatch)
    monkeypatch.setitem(BUILDERS, "tensorrt", BrokenBuilder())
    found = examine("tensorrt")
    assert found.build_obstacle == "OSError: libnvinfer.so.11: cannot open shared object file"
    assert found.version is None
    assert "pip install 'hemiola[tensorrt]'" in (found.run_obstacle or "")


@pytest.mark.parametrize("name", list(BACKENDS))
def test_what_does_not_work_names_what_mends_it(name: str) -> None:
    found = examine(name)
    for obstacle in (found.build_obstacle, found.run_obstacle):
        assert obstacle is None or "pip install" in obstacle or "this machine" in obstacle or "NVIDIA" in obstacle


def test_one_backend_that_runs_is_enough(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("hemiola.commands.doctor.examine", _only("tensorrt"))
    assert main(["doctor"]) == 0
    assert "backend tensorrt: does not build here but runs here" in capsys.readouterr().out


def test_none_is_too_few(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("hemiola.commands.doctor.examine", _only("none of them"))
    assert main(["doctor"]) == 1
    assert "runs here" not in capsys.readouterr().out


def _only(running: str) -> Callable[[str], Examined]:
    return lambda name: Examined(name, None, "it is not installed", None if name == running else "there is no GPU")


def test_a_bundle_that_runs_here_is_told_from_one_that_does_not(
    latent: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(latent.bundle)]) == 0
    assert capsys.readouterr().out == f"{latent.bundle} runs here\n"
    bundle = shutil.copytree(latent.bundle, tmp_path / "bundle")
    manifest = read_manifest(bundle)
    write_manifest(replace(manifest, backend=replace(manifest.backend, version="99.0.0")), bundle)
    assert main(["doctor", str(bundle)]) == 1
    assert "does not run here: the bundle was built with onnxruntime 99.0.0" in capsys.readouterr().out
    (bundle / "engines" / "reuse.onnx").unlink()
    assert main(["doctor", str(bundle)]) == 1
    assert "cannot read engines/reuse.onnx of the bundle" in capsys.readouterr().err
