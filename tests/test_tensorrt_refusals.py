"""What the TensorRT backend refuses: machines, versions, engines and launches, each with what would mend it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
from cuda.bindings import runtime

import fake_tensorrt
from bundles import Made
from fake_cuda import FakeCudart
from gpu_bundles import (
    RTX,
    assert_close,
    fail_once,
    install_driver,
    install_gpu,
    install_library,
    tensorrt_bundle,
)
from hemiola_runtime import backends
from hemiola_runtime.backends import BackendOptions, cuda, open_backend, tensorrt
from hemiola_runtime.bundle import Bundle, open_bundle
from hemiola_runtime.errors import BundleError, DeviceError
from hemiola_runtime.manifest import EngineSpec, Profile
from hemiola_runtime.results import Result
from hemiola_runtime.sampler import Sampler

Patch = pytest.MonkeyPatch
NUM_ENGINES: Final = 6  # of `latent`
REQUEST: Final[dict[str, Any]] = {"labels": [3, 4], "seeds": [5, 9], "guidance_scale": [2.0, 3.5]}


@pytest.fixture(scope="module")
def bundle(latent: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tensorrt_bundle(latent.graphs, tmp_path_factory.mktemp("tensorrt") / "bundle")


@pytest.fixture(scope="module")
def compatible(latent: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compatible") / "bundle"
    return tensorrt_bundle(latent.graphs, folder, is_version_compatible=True)


@pytest.fixture(scope="module")
def rtx_bundle(latent: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tensorrt_bundle(latent.graphs, tmp_path_factory.mktemp("rtx") / "bundle", RTX)


@pytest.fixture(scope="module")
def expected(latent: Made) -> Result:
    """What ONNX Runtime draws."""
    with Sampler.open(latent.bundle) as sampler:
        return sampler.generate(**REQUEST)


@pytest.fixture
def cudart(monkeypatch: Patch) -> Iterator[FakeCudart]:
    """A machine on which nothing may be left."""
    machine = install_gpu(monkeypatch)
    yield machine
    tensorrt._listeners.cache_clear()
    assert not machine.live


@pytest.fixture
def library(monkeypatch: Patch, cudart: FakeCudart) -> Any:
    return install_library(monkeypatch, cudart)


# bundles and machines that are refused


def test_a_machine_without_a_driver_is_told_so_and_no_library_is_imported(bundle: Path, monkeypatch: Patch) -> None:
    def load(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    def import_module(name: str) -> Any:
        raise AssertionError(f"{name} is imported")

    install_driver(monkeypatch, load)
    for module in (tensorrt, cuda):
        monkeypatch.setattr(module, "importlib", SimpleNamespace(import_module=import_module))
    with pytest.raises(BundleError, match=r"no NVIDIA driver \(libcuda\.so\.1 is not found\)\. It was built with"):
        Sampler.open(bundle)


install_older: Final = partial(install_library, version="11.3.0")
install_newer: Final = partial(install_library, version="11.5.0")
install_lean: Final = partial(install_library, kind="tensorrt_lean")
install_rtx: Final = partial(install_library, kind="tensorrt_rtx")


def install_nothing(monkeypatch: Patch, gpu: FakeCudart) -> None: ...


def start_no_driver(monkeypatch: Patch, gpu: FakeCudart) -> None:
    install_driver(monkeypatch, lambda _: SimpleNamespace(cuInit=lambda _: 999))


def age_the_driver(monkeypatch: Patch, gpu: FakeCudart) -> None:
    gpu.fail("cudaGetDeviceCount", runtime.cudaError_t.cudaErrorInsufficientDriver)


def remove_bindings(monkeypatch: Patch, gpu: FakeCudart) -> None:
    monkeypatch.setitem(sys.modules, cuda.BINDINGS, None)


@pytest.mark.parametrize(
    ("machine", "prepare", "message"),
    [
        ({}, start_no_driver, r"driver does not start \(cuInit gives 999\)"),
        ({}, age_the_driver, "CUDA does not start: CUDA driver version is insufficient for CUDA runtime version"),
        ({}, remove_bindings, r"cuda-bindings cannot be imported .*pip install 'cuda-bindings>=13,<14'"),
        ({}, install_nothing, r"no library runs its engines \(tensorrt: .*\)\. pip install 'hemiola\[tensorrt\]'"),
        ({}, install_lean, r"no library runs its engines \(tensorrt: .* in sys\.modules\)\. pip install"),
        ({}, install_rtx, r"pip install 'hemiola\[tensorrt\]'"),
        ({}, install_older, r"need tensorrt 11\.4\.0 exactly, but 11\.3\.0 is installed\..*It was built with: \S+"),
        ({}, install_newer, r"need tensorrt 11\.4\.0 exactly, but 11\.5\.0 is installed\..*It was built with: \S+"),
        (
            {"gpu_name": "NVIDIA H200", "compute_capability": (9, 0)},
            install_library,
            r"built on NVIDIA L40S \(8\.9\) and run on no other GPU, but this is NVIDIA H200 \(compute capability 9\.0",
        ),
        (
            {"compute_capability": (9, 0)},
            install_library,
            r"built for compute capability 8\.9, but this is NVIDIA L40S \(compute capability 9\.0\)",
        ),
    ],
)
def test_a_machine_that_does_not_run_the_engines_is_told_why(
    bundle: Path,
    monkeypatch: Patch,
    machine: dict[str, Any],
    prepare: Callable[..., Any],
    message: str,
) -> None:
    cudart = install_gpu(monkeypatch, **machine)
    prepare(monkeypatch, cudart)
    with pytest.raises(BundleError, match=message):
        Sampler.open(bundle)
    assert "deserialize_cuda_engine" not in cudart.names()
    assert not cudart.live


def test_a_fourth_number_of_the_version_does_not_matter(bundle: Path, library: Any, expected: Result) -> None:
    library.__version__ = "11.4.0.63"
    with Sampler.open(bundle) as sampler:
        assert_close(sampler.generate(**REQUEST), expected)


@pytest.mark.parametrize("install", [install_library, install_newer, install_lean])
def test_a_version_compatible_bundle_runs_on_newer_versions_and_on_the_lean_runtime(
    compatible: Path, cudart: FakeCudart, monkeypatch: Patch, expected: Result, install: Callable[..., Any]
) -> None:
    install(monkeypatch, cudart)
    with Sampler.open(compatible) as sampler:
        assert_close(sampler.generate(**REQUEST), expected)


def test_a_version_compatible_bundle_runs_on_no_older_version(compatible: Path, monkeypatch: Patch) -> None:
    install_library(monkeypatch, install_gpu(monkeypatch), version="11.3.9")
    with pytest.raises(BundleError, match=r"need tensorrt 11\.4\.0 or newer, but 11\.3\.9 is installed"):
        Sampler.open(compatible)


@pytest.mark.parametrize("is_version_compatible", [True, False])
def test_engines_may_bring_code_for_the_host_only_in_version_compatible_bundles(
    bundle: Path, compatible: Path, library: Any, is_version_compatible: bool
) -> None:
    with Sampler.open(compatible if is_version_compatible else bundle) as sampler:
        assert sampler._backend._runtime.engine_host_code_allowed is is_version_compatible  # type: ignore[attr-defined]


def test_a_library_that_does_not_start_is_told_with_its_version(bundle: Path, library: Any, monkeypatch: Patch) -> None:
    def refuse(log: Any) -> None:
        log.log(library.ILogger.Severity.ERROR, "no CUDA-capable device")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(library, "Runtime", refuse)
    with pytest.raises(DeviceError, match=r"TensorRT 11\.4\.0 does not start: no CUDA-capable device"):
        Sampler.open(bundle)


# engines that are refused


@dataclass(frozen=True, slots=True)
class Loaded:
    """A backend by itself."""

    bundle: Bundle
    backend: Any

    def spec(self, name: str) -> EngineSpec:
        return self.bundle.manifest.engines[name]

    def load(self, spec: EngineSpec) -> Any:
        return self.backend.load(spec, self.bundle.files[spec.graph.file])


@pytest.fixture
def loaded(bundle: Path, library: Any) -> Loaded:
    opened = open_bundle(bundle)
    options = BackendOptions(opened.weights, opened.folder, None, "hemiola build")
    return Loaded(opened, open_backend(opened.manifest.backend, options))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Cannot deserialize engine with an empty memory buffer"),
        (b"no engine", r"magicTag == kEXPECTED_MAGIC_TAG failed.*INVALID_ARGUMENT"),
    ],
)
def test_bytes_that_are_no_engine_are_refused_in_tensorrts_words(loaded: Loaded, data: bytes, reason: str) -> None:
    with pytest.raises(BundleError, match=rf"TensorRT 11\.4\.0 refuses the engine `full`: .*{reason}.*`hemiola build`"):
        loaded.backend.load(loaded.spec("full"), data)


def with_inputs(spec: EngineSpec, **changes: Any) -> EngineSpec:
    """Change the first input, or with `at` another."""
    at = changes.pop("at", 0)
    inputs = list(spec.graph.inputs)
    inputs[at] = replace(inputs[at], **changes)
    return replace(spec, graph=replace(spec.graph, inputs=tuple(inputs)))


def as_output(spec: EngineSpec) -> EngineSpec:
    first, *others = spec.graph.inputs
    graph = replace(spec.graph, inputs=tuple(others), outputs=(first, *spec.graph.outputs))
    return replace(spec, graph=graph)


def less_one(spec: EngineSpec) -> EngineSpec:
    return replace(spec, graph=replace(spec.graph, outputs=spec.graph.outputs[:-1]))


def tuned(*profiles: Profile) -> Callable[[EngineSpec], EngineSpec]:
    return lambda spec: replace(spec, profiles=profiles)


ONE: Final = Profile({"B": (1, 1, 1), "K": (4, 4, 4)})
MANY: Final = Profile({"B": (2, 3, 3), "K": (4, 4, 4)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: with_inputs(spec, name="stat"), r"its tensor stat is missing instead of \(True, 'float32'"),
        (lambda spec: with_inputs(spec, dtype="float16"), r"state is \(True, 'float32', .* instead of .*'float16'"),
        (
            lambda spec: with_inputs(spec, shape=(3, "B", 16)),
            r"state is .* instead of \(True, 'float32', \(3, -1, 16\)",
        ),
        (lambda spec: with_inputs(spec, shape=(4, "B", 16, 16)), r"\(3, -1, 16, 16\)\) instead of .*\(4, -1, 16, 16"),
        (as_output, r"state is \(True, .* instead of \(False, "),
        (less_one, r"its tensor next_staleness is \(False, 'float32', \(2, -1, 16\)\) instead of absent"),
        (tuned(ONE), "has 2 optimization profiles, the manifest 1"),
        (tuned(MANY, ONE), r"profile 0 .* takes B = \(1, 1, 1\) of state, the manifest says \(2, 3, 3\)"),
        (tuned(ONE, Profile({"B": (2, 2, 3), "K": (4, 4, 4)})), r"profile 1 .* takes B = \(2, 3, 3\).* \(2, 2, 3\)"),
        (tuned(ONE, Profile({"B": (2, 3, 3), "K": (4, 4, 8)})), r"K = \(4, 4, 4\) of token_slots, .* \(4, 4, 8\)"),
    ],
)
def test_an_engine_that_is_not_what_the_manifest_says_is_refused_with_both(
    loaded: Loaded, change: Callable[[EngineSpec], EngineSpec], message: str
) -> None:
    assert loaded.spec("tokens").profiles == (ONE, MANY)
    with pytest.raises(BundleError, match=rf"{message}.*`hemiola build`"):
        loaded.load(change(loaded.spec("tokens")))


def test_a_workspace_has_room_for_the_hungriest_engine(loaded: Loaded) -> None:
    engines = [loaded.load(spec)._engine for spec in loaded.bundle.manifest.engines.values()]
    assert loaded.backend.activation_bytes == max(engine.device_memory_size_v2 for engine in engines)
    workspace = loaded.backend.workspace(1000, 256)
    assert workspace.activation_address == workspace.address + 1024
    assert workspace.activation_bytes == loaded.backend.activation_bytes
    workspace.close()


# launches that are refused when they are bound, or at the first run


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("create_execution_context", "`conditioning` gives no execution context: told"),
        ("set_optimization_profile_async", "`conditioning` refuses its profile 1: told"),
        ("set_input_shape", r"`conditioning` refuses labels of shape \(2,\) under \{'B': \(2, 3, 3\), .*\}: told"),
        ("infer_shapes", "`conditioning` cannot tell the shapes of labels, timesteps: told"),
        ("set_tensor_address", r"`conditioning` refuses the address 0x[0-9a-f]+ of labels: told"),
        ("execute_async_v3", "`conditioning` does not run: told"),
    ],
)
def test_what_tensorrt_refuses_is_told_in_its_words(bundle: Path, library: Any, method: str, message: str) -> None:
    library.failures[method] = "told"
    with Sampler.open(bundle) as sampler:
        with pytest.raises(DeviceError, match=message):
            sampler.prepare([2])
        library.failures.clear()
        sampler.generate(**REQUEST)


def test_shapes_that_cannot_be_inferred_are_told_in_the_words_of_the_exception(bundle: Path, library: Any) -> None:
    library.failures["infer_shapes"] = RuntimeError("shape inference failed")
    with (
        Sampler.open(bundle) as sampler,
        pytest.raises(DeviceError, match=r"`conditioning` cannot tell its shapes \(shape inference failed\)"),
    ):
        sampler.prepare([1])


def test_an_output_of_another_shape_is_refused_with_both(bundle: Path, library: Any, monkeypatch: Patch) -> None:
    monkeypatch.setattr(fake_tensorrt.Context, "get_tensor_shape", lambda context, name: (9, 32))
    with Sampler.open(bundle) as sampler, pytest.raises(DeviceError, match=r"of shape \(9, 32\), not \(12, 32\)"):
        sampler.prepare([1])  # T = 6 steps of R = 2 rows


def test_what_was_said_once_is_not_said_again(bundle: Path, library: Any, monkeypatch: Patch) -> None:
    with Sampler.open(bundle, cuda_graphs=False) as sampler:
        library.failures["execute_async_v3"] = "told"
        with pytest.raises(DeviceError, match="does not run: told"):
            sampler.generate(**REQUEST)
        library.failures.clear()
        fail_once(monkeypatch, fake_tensorrt.Context, "execute_async_v3", False)
        with pytest.raises(DeviceError, match="does not run: TensorRT gave no reason"):
            sampler.generate(**REQUEST)


def test_a_model_whose_vectors_are_not_aligned_is_refused_on_opening_with_the_reason(
    unguided: Made, library: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    bundle = tensorrt_bundle(unguided.graphs, tmp_path / "bundle", max_batch_size=2)
    wider = replace(backends.BACKENDS["tensorrt"], alignment=512)  # 1 row of width 64 in float32 is 256 bytes
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "tensorrt": wider})
    with pytest.raises(BundleError, match=r"`\w+` reads \S+ 256 bytes behind a multiple of 512,.* a multiple of 128"):
        Sampler.open(bundle)


# TensorRT-RTX


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_tensorrt_rtx_draws_the_same_with_kernels_that_are_final_at_once(
    rtx_bundle: Path, cudart: FakeCudart, monkeypatch: Patch, expected: Result, cuda_graphs: bool
) -> None:
    install_library(monkeypatch, cudart, "tensorrt_rtx")
    with Sampler.open(rtx_bundle, cuda_graphs=cuda_graphs) as sampler:
        assert_close(sampler.generate(**REQUEST), expected)
    made = cudart.since(name="create_execution_context")
    assert len(made) == NUM_ENGINES
    assert {call["dynamic_shapes_kernel_specialization_strategy"].name for call in made} == {"EAGER"}
    assert {call["cuda_graph_strategy"].name for call in made} == {"DISABLED"}
    assert {call["strategy"].name for call in made} == {"USER_MANAGED"}


def test_contexts_of_tensorrt_are_given_their_memory_too(bundle: Path, cudart: FakeCudart, library: Any) -> None:
    with Sampler.open(bundle) as sampler:
        sampler.prepare([1])
    assert {call["strategy"].name for call in cudart.since(name="create_execution_context")} == {"USER_MANAGED"}


def test_tensorrt_rtx_names_why_an_engine_is_not_for_this_gpu(latent: Made, monkeypatch: Patch, tmp_path: Path) -> None:
    builder = replace(RTX, compute_capability=(12, 0))  # and the manifest claims 8.9
    bundle = tensorrt_bundle(latent.graphs, tmp_path / "bundle", builder)
    cudart = install_gpu(monkeypatch)
    install_library(monkeypatch, cudart, "tensorrt_rtx")
    message = r"TensorRT-RTX 1\.7\.1\.116 cannot run the engine `conditioning` on NVIDIA L40S \(UNSUPPORTED_CC\)"
    with pytest.raises(BundleError, match=message):
        Sampler.open(bundle)
    assert "deserialize_cuda_engine" not in cudart.names()


@pytest.mark.parametrize(
    ("machine", "version", "message"),
    [
        ({}, None, r"\(tensorrt_rtx: .*\)\. pip install 'hemiola\[tensorrt-rtx\]'"),
        ({}, "1.8.0.1", r"need tensorrt_rtx 1\.7\.1\.116 exactly, but 1\.8\.0\.1 is installed"),
        ({"compute_capability": (9, 0), "gpu_name": "NVIDIA H200"}, "1.7.1.116", r"capability 8\.6, 8\.9, but .*H200"),
    ],
)
def test_a_machine_that_does_not_run_engines_of_tensorrt_rtx_is_told_why(
    rtx_bundle: Path, monkeypatch: Patch, machine: dict[str, Any], version: str | None, message: str
) -> None:
    cudart = install_gpu(monkeypatch, **machine)
    if version is not None:
        install_library(monkeypatch, cudart, "tensorrt_rtx", version)
    with pytest.raises(BundleError, match=message):
        Sampler.open(rtx_bundle)
