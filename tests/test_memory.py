from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from hemiola_runtime.errors import CapacityError
from hemiola_runtime.graphs import WeightSpec
from hemiola_runtime.manifest import EngineSpec, FileSpec, Manifest, read_manifest
from hemiola_runtime.memory import MemoryPlan, available_host_bytes, plan_memory

MANIFEST: Final = read_manifest(Path(__file__).parent / "golden")  # guided, up to 8 images, one engine of 4096 a row
PLAN: Final = MemoryPlan(weights_bytes=100_000, workspace_bytes=2_000, activation_bytes=500, max_concurrency=4)


def test_a_plan_is_the_weights_once_and_the_rest_for_each_concurrent_request() -> None:
    assert PLAN.total_bytes == 100_000 + 4 * (2_000 + 500)


def test_a_plan_is_written_as_people_read_it() -> None:
    assert str(PLAN) == "110.0 kB = 100.0 kB weights + 4 × (2.0 kB caches and states + 500 B activations)"


def test_the_workspaces_of_components_count_once_for_all_requests() -> None:
    plan = replace(PLAN, components_bytes=30_000)
    assert plan.total_bytes == PLAN.total_bytes + 30_000
    assert str(plan) == (
        "140.0 kB = 100.0 kB weights + 30.0 kB text and tiles + 4 × (2.0 kB caches and states + 500 B activations)"
    )
    plan.check_workspaces(40_000)
    with pytest.raises(CapacityError, match=r"40\.0 kB are free"):
        plan.check_workspaces(39_999)
    assert plan_memory(MANIFEST, 11, 3, [10_000, 20_000]).components_bytes == 30_000


def test_a_plan_that_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(CapacityError) as caught:
        PLAN.check(109_999)
    assert f"the bundle needs {PLAN}" in str(caught.value)
    assert "110.0 kB are free" in str(caught.value)  # 109,999 rounded
    assert "Lower max_concurrency, or build with a smaller --max-batch-size" in str(caught.value)


@pytest.mark.parametrize("available_bytes", [110_000, 1 << 40, None])
def test_a_plan_that_fits_or_cannot_be_judged_passes(available_bytes: int | None) -> None:
    PLAN.check(available_bytes)
    with pytest.raises(CapacityError):  # one byte more would not
        replace(PLAN, weights_bytes=100_001).check(110_000)


@pytest.mark.parametrize("available_bytes", [10_000, None])
def test_once_the_weights_are_loaded_only_workspaces_must_fit(available_bytes: int | None) -> None:
    PLAN.check_workspaces(available_bytes)  # 4 · (2,000 + 500)
    with pytest.raises(CapacityError) as caught:
        PLAN.check_workspaces(9_999)
    assert f"the bundle needs {PLAN}, but 10.0 kB are free (the weights are loaded)" in str(caught.value)
    assert "Lower max_concurrency" in str(caught.value)


def test_what_engines_ask_for_takes_the_place_of_the_estimate() -> None:
    plan = PLAN.with_activation(7_000)
    assert plan == MemoryPlan(100_000, 2_000, 7_000, 4)
    assert plan.total_bytes == 100_000 + 4 * 9_000


def _with_engines(manifest: Manifest, bytes_per_row: dict[str, int]) -> Manifest:
    graph = manifest.engines["deep"].graph
    engines = {
        name: EngineSpec(replace(graph, name=name, activation_bytes_per_row=size), "00" * 32, ())
        for name, size in bytes_per_row.items()
    }
    return replace(manifest, engines=engines, forwards={"full": ("full",)})


@pytest.mark.parametrize(
    ("guidance", "max_batch_size", "activation_bytes"),
    [
        ("classifier_free", 8, 2 * 8 * 5000),  # two rows an image
        ("classifier_free", 1, 2 * 5000),
        ("none", 8, 8 * 5000),
    ],
)
def test_activations_are_those_of_the_largest_engine_at_the_largest_batch(
    guidance: Any, max_batch_size: int, activation_bytes: int
) -> None:
    manifest = _with_engines(MANIFEST, {"full": 5000, "reuse": 300, "conditioning": 4999})
    manifest = replace(manifest, max_batch_size=max_batch_size, pipeline=replace(manifest.pipeline, guidance=guidance))
    plan = plan_memory(manifest, workspace_bytes=11, max_concurrency=3)
    assert plan == MemoryPlan(4352, 11, activation_bytes, 3)  # the golden manifest's weight file


WEIGHTS: Final = {  # engine → the weights that it reads, as bytes and place; `front` and `deep` share the second
    "conditioning": (WeightSpec("a", "float32", (10,), 0),),
    "front": (WeightSpec("a", "float32", (10,), 0), WeightSpec("b", "float16", (100,), 256)),
    "deep": (WeightSpec("b", "float16", (100,), 256),),
}


@pytest.mark.parametrize(
    ("backend", "is_in_file", "weights_bytes"),
    [
        ("onnxruntime", True, 456),  # the file, mapped once
        ("onnxruntime_cuda", True, 40 + 240 + 200),  # a copy for each engine
        ("tensorrt", False, 1000 + 2000 + 3000),  # the engines' own files
    ],
)
def test_weights_are_counted_where_they_lie(backend: str, is_in_file: bool, weights_bytes: int) -> None:
    engines = {
        name: replace(
            engine,
            graph=replace(engine.graph, file=f"engines/{name}", weights=WEIGHTS[name] if is_in_file else ()),
        )
        for name, engine in MANIFEST.engines.items()
    }
    sizes = {"conditioning": 1000, "front": 2000, "deep": 3000, "weights.bin": 456}
    files = {f"engines/{name}": FileSpec("00" * 32, size) for name, size in sizes.items()}
    manifest = replace(
        MANIFEST,
        backend=replace(MANIFEST.backend, name=backend),
        engines=engines,
        files=MANIFEST.files | files,
    )
    assert plan_memory(manifest, workspace_bytes=0, max_concurrency=1).weights_bytes == weights_bytes


def _file_of(text: str) -> Callable[..., str]:
    return lambda *_args, **_options: text


def test_free_memory_is_what_the_system_calls_available(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:    2000000 kB\n"
    monkeypatch.setattr(Path, "read_text", _file_of(text))
    assert available_host_bytes() == 2_000_000 * 1024  # "kB" are KiB there: proc(5)


def test_free_memory_is_unknown_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", _file_of("MemTotal: 24000000 kB\n"))
    assert available_host_bytes() is None


def test_free_memory_is_unknown_where_there_is_no_such_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_args: object, **_options: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert available_host_bytes() is None


def test_a_decoder_takes_images_and_no_guided_rows() -> None:
    manifest = _with_engines(MANIFEST, {"conditioning": 1, "full": 3000, "vae_decoder": 5000})
    assert plan_memory(manifest, 0, 1).activation_bytes == max(2 * 8 * 3000, 8 * 5000)
    larger = _with_engines(MANIFEST, {"conditioning": 1, "full": 3000, "vae_decoder": 9000})
    assert plan_memory(larger, 0, 1).activation_bytes == 8 * 9000


@pytest.mark.parametrize(("of_encoder", "activation_bytes"), [(40_000, 2 * 8 * 3000), (50_000, 50_000)])
def test_a_text_encoder_takes_one_prompt_at_a_time(of_encoder: int, activation_bytes: int) -> None:
    manifest = _with_engines(MANIFEST, {"conditioning": 1, "full": 3000, "text_encoder": of_encoder})
    assert plan_memory(manifest, 0, 1).activation_bytes == activation_bytes
