"""Engines that run by themselves, on workspaces of host memory and with engines that are Python functions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hemiola_runtime.backends import Bound, Workspace
from hemiola_runtime.components import Component, Components
from hemiola_runtime.errors import BundleError, RequestError
from hemiola_runtime.graph_set import TOKENIZER_FILE
from hemiola_runtime.manifest import EngineSpec, Manifest
from hemiola_runtime.patches import from_patches
from hemiola_runtime.pipeline import Pipeline, TextSpec
from hemiola_runtime.program import Launch
from hemiola_runtime.report import TextReport
from hemiola_runtime.request import Request
from hemiola_runtime.schedule import ModelIdentity
from hemiola_runtime.storage import from_bytes, to_bytes
from strategies import TEXT_BRANCHES, graph_specs, manifest_of

Arrays: TypeAlias = dict[str, NDArray[Any]]
Compute: TypeAlias = Callable[[Arrays], Arrays]

PIPELINE: Final = Pipeline(
    model=ModelIdentity("pixart", "tiny", "00" * 32, (3, 8, 8)),
    guidance="classifier_free",
    num_blocks=1,
    width=2,
    patch_size=2,
    branches=TEXT_BRANCHES,
    state_rows=1,
    deep_start=None,
    selector=None,
    mask=None,
    has_block_counts=False,
    labels={},
    text=TextSpec(num_tokens=4),
    min_size=(4, 4),
    max_size=(12, 20),
    pixels_per_latent=2,
    image_channels=3,
    tile_size=8,
)
WORDS: Final = ("<pad>", "</s>", "<unk>", "a", "red", "blue", "hen")


def manifest(**changes: Any) -> Manifest:
    pipeline = replace(PIPELINE, **changes)
    return manifest_of(pipeline, graph_specs(pipeline, has_decoder=True))


def tokenizer() -> bytes:
    """Make a tokenizer of words that takes three of them, and ends prompts with `</s>`."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.enable_truncation(4)
    made.enable_padding(length=4, pad_id=0, pad_token="<pad>")
    return made.to_str().encode()


FILES: Final = {TOKENIZER_FILE: tokenizer()}


class FakeTimeline:
    def mark(self, index: int) -> None: ...

    def wait(self, index: int) -> None: ...

    def elapsed_ms(self, first: int, last: int) -> float:
        return 0.0


class FakeWorkspace:
    def __init__(self, num_bytes: int, staged_bytes: int) -> None:
        self.memory = np.zeros(num_bytes, dtype=np.uint8)
        self.staged_bytes = staged_bytes
        self.is_closed = False

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        assert offset + len(data) <= self.staged_bytes
        self.memory[offset : offset + len(data)] = data

    def write_anywhere(self, offset: int, data: NDArray[np.uint8]) -> None:
        raise AssertionError("components write what is staged alone")

    def read(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        assert offset + num_bytes <= len(self.memory)
        return self.memory[offset : offset + num_bytes].copy()

    def timeline(self, num_marks: int) -> FakeTimeline:
        return FakeTimeline()

    def capture(self, launches: Sequence[Bound]) -> None:
        raise AssertionError("components are not captured")

    def wait(self) -> None: ...

    def release(self) -> None:
        raise AssertionError("a component has few sizes")

    def close(self) -> None:
        assert not self.is_closed, "closed twice"
        self.is_closed = True


@dataclass
class FakeBackend:
    """Host memory; every workspace that was asked for, in order."""

    workspaces: list[FakeWorkspace] = field(default_factory=list)
    available_bytes: int | None = None
    activation_bytes: int | None = None

    def load(self, spec: EngineSpec, data: bytes) -> FakeEngine:
        raise AssertionError("engines are loaded by the sampler")

    def workspace(self, num_bytes: int, staged_bytes: int) -> FakeWorkspace:
        self.workspaces.append(FakeWorkspace(num_bytes, staged_bytes))
        return self.workspaces[-1]

    def close(self) -> None: ...


@dataclass
class FakeBound:
    launch: Launch
    workspace: FakeWorkspace
    owner: FakeEngine

    @property
    def engine(self) -> str:
        return self.launch.engine

    def enqueue(self) -> None:
        places = self.launch.tensors
        raw = {name: self.workspace.memory[places[name].offset : places[name].end] for name in self.owner.reads}
        for name, values in self.owner.run({n: from_bytes(raw[n].copy(), places[n]) for n in raw}).items():
            self.workspace.memory[places[name].offset : places[name].end] = to_bytes(values, places[name])


@dataclass
class FakeEngine:
    """A function, which notes what it was given and refuses to run twice at once."""

    reads: tuple[str, ...]
    compute: Compute
    given: list[Arrays] = field(default_factory=list)
    busy: threading.Lock = field(default_factory=threading.Lock)

    def bind(self, launch: Launch, workspace: Workspace) -> FakeBound:
        assert isinstance(workspace, FakeWorkspace)
        return FakeBound(launch, workspace, self)

    def run(self, inputs: Arrays) -> Arrays:
        assert self.busy.acquire(blocking=False), "two runs at once"
        try:
            self.given.append(inputs)
            time.sleep(0.001)
            return self.compute(inputs)
        finally:
            self.busy.release()

    def close(self) -> None:
        raise AssertionError("components do not own the engines")


def encoded(ids: Sequence[int]) -> list[list[float]]:
    """Return what the fake text encoder makes of a prompt: its token and its place, for each."""
    return [[float(token), float(i)] for i, token in enumerate(ids)]


def encode(inputs: Arrays) -> Arrays:
    return {"text_embeddings": np.array([encoded(inputs["token_ids"][0])], dtype=np.float32)}


def enlarged(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn latents (B, C, H, W) into pictures (B, 2H, 2W, C)."""
    return latents.repeat(2, axis=2).repeat(2, axis=3).transpose(0, 2, 3, 1)


def decode(inputs: Arrays) -> Arrays:
    patches = inputs["latents"]  # (1, rows, columns, p, p, C)
    _, rows, columns, side, _, _ = patches.shape
    latents = from_patches(patches.reshape(1, rows * columns, -1), side, (rows * side, columns * side))
    return {"images": enlarged(latents)}


@dataclass
class Bench:
    backend: FakeBackend
    engines: Mapping[str, FakeEngine]
    components: Components


def bench(of: Manifest, files: Mapping[str, bytes] = FILES) -> Bench:
    backend = FakeBackend()
    engines = {
        "text_encoder": FakeEngine(("token_ids", "text_mask"), encode),
        "vae_decoder": FakeEngine(("latents",), decode),
    }
    return Bench(backend, engines, Components(of, files, engines, backend))


def request(prompts: tuple[str, ...], negative: tuple[str, ...] = ()) -> Request:
    batch = len(prompts)
    noise = np.zeros((batch, 3, 8, 8), dtype=np.float32)
    return Request(None, prompts, negative, tuple(range(batch)), np.ones(batch, dtype=np.float32), noise)


def test_labels_are_handed_on_as_they_are() -> None:
    labels = np.array([3, 1])
    on = bench(manifest(labels={"0": "hen"}, text=None, tile_size=None))
    conditions, report = on.components.conditions(replace(request(("", "")), prompts=(), labels=labels))
    assert list(conditions) == ["labels"]
    assert conditions["labels"] is labels
    assert report is None


def test_prompts_become_what_conditioning_reads_negative_ones_first() -> None:
    on = bench(manifest())
    conditions, _ = on.components.conditions(request(("red", "blue hen"), ("a", "")))
    rows = [[[3, 1, 0, 0], [4, 1, 0, 0]], [[1, 0, 0, 0], [5, 6, 1, 0]]]  # tokens of (negative, prompt) of each image
    expected = [[encoded(ids) for ids in of_image] for of_image in rows]
    assert conditions["text_embeddings"].tolist() == expected
    assert conditions["text_mask"].tolist() == [[[float(token > 0) for token in ids] for ids in im] for im in rows]
    shapes = {name: array.shape for name, array in conditions.items()}
    graph = manifest().graphs["conditioning"]
    symbols = PIPELINE.symbols(2, 1)
    read = {spec.name: spec.resolve(symbols) for spec in graph.inputs if spec.name.startswith("text_")}
    assert shapes == read


def test_the_report_says_which_prompts_were_encoded_and_which_were_cut() -> None:
    on = bench(manifest())
    long = "a red hen a blue hen"  # six words and the end, where four tokens are read
    _, report = on.components.conditions(request(("red", long), ("", "")))
    assert report == TextReport(num_kept=1, num_encoded=3, truncated={long: 7})
    _, report = on.components.conditions(request((long,), ("",)))
    assert report == TextReport(num_kept=2, num_encoded=0, truncated={long: 7})
    assert len(on.engines["text_encoder"].given) == 3


def test_many_threads_run_one_engine_one_at_a_time() -> None:
    backend, engine = FakeBackend(), FakeEngine(("token_ids", "text_mask"), encode)
    component = Component(manifest(), "text_encoder", {"text_encoder": engine}, backend, (8, 8))
    mask = np.ones((1, 4), dtype=np.float32)

    def run(token: int) -> list[Any]:
        outputs = component.run((8, 8), token_ids=np.full((1, 4), token), text_mask=mask)
        found: list[Any] = outputs["text_embeddings"][0].tolist()
        return found

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(24))) == [encoded([token] * 4) for token in range(24)]
    assert len(backend.workspaces) == 1


def test_an_engine_that_failed_runs_again() -> None:
    failures = [OSError("the device is gone")]

    def fail_once(inputs: Arrays) -> Arrays:
        if failures:
            raise failures.pop()
        return encode(inputs)

    engine = FakeEngine(("token_ids", "text_mask"), fail_once)
    component = Component(manifest(), "text_encoder", {"text_encoder": engine}, FakeBackend(), (8, 8))
    given: Arrays = {"token_ids": np.array([[1, 2, 3, 4]]), "text_mask": np.ones((1, 4), dtype=np.float32)}
    with pytest.raises(OSError, match="gone"):
        component.run((8, 8), **given)
    assert component.run((8, 8), **given)["text_embeddings"][0].tolist() == encoded([1, 2, 3, 4])


def test_a_prompt_that_is_no_text_is_refused() -> None:
    with pytest.raises(RequestError, match="half of a character"):
        bench(manifest()).components.conditions(request(("\ud800",), ("",)))


@pytest.mark.parametrize("size", [(12, 20), (12, 4), (6, 20), (10, 8)])
def test_large_latents_are_decoded_in_tiles_to_the_picture_of_the_whole(size: tuple[int, int]) -> None:
    on = bench(manifest())
    numbers = np.random.default_rng(0).integers(-3, 4, (2, 3, *size))
    latents = np.ldexp(np.float32(1), numbers).astype(np.float32)  # whose means with themselves are exact
    pictures = on.components.decode(latents)
    assert np.array_equal(pictures, enlarged(latents))
    rows, columns = min(size[0], 8) // 2, min(size[1], 8) // 2
    shapes = {given["latents"].shape for given in on.engines["vae_decoder"].given}
    assert shapes == {(1, rows, columns, 2, 2, 3)}


@pytest.mark.parametrize(
    ("changes", "num_workspaces"),
    [
        ({}, 2),
        ({"tile_size": None}, 1),  # whole pictures are decoded by the trajectory
        ({"tile_size": 20}, 1),  # as large as the largest picture
        ({"labels": {"0": "hen"}, "text": None}, 1),
        ({"labels": {"0": "hen"}, "text": None, "tile_size": None}, 0),
    ],
)
def test_there_is_a_workspace_for_each_engine_that_runs_by_itself(changes: dict[str, Any], num_workspaces: int) -> None:
    on = bench(manifest(**changes))
    assert len(on.backend.workspaces) == num_workspaces
    allocated = sum(len(workspace.memory) for workspace in on.backend.workspaces)
    assert sum(Components.num_bytes(manifest(**changes))) == allocated


def test_closing_frees_all_workspaces() -> None:
    on = bench(manifest())
    assert [workspace.is_closed for workspace in on.backend.workspaces] == [False, False]
    on.components.close()
    assert [workspace.is_closed for workspace in on.backend.workspaces] == [True, True]
    on.components.close()  # again does nothing


def test_a_tokenizer_that_cannot_be_read_leaves_no_workspace_behind() -> None:
    backend = FakeBackend()
    with pytest.raises(BundleError, match="cannot read the bundle's tokenizer"):
        Components(manifest(), {TOKENIZER_FILE: b"{}"}, {}, backend)
    assert [workspace.is_closed for workspace in backend.workspaces] == [True, True]
