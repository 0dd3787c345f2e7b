"""Engines that run by themselves, outside of trajectories: the text encoder, and the decoder of tiles."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hemiola_runtime.backends import Backend, Engine
from hemiola_runtime.errors import NumericError
from hemiola_runtime.graph_set import TOKENIZER_FILE
from hemiola_runtime.graphs import TEXT_ENCODER, VAE_DECODER
from hemiola_runtime.manifest import Manifest
from hemiola_runtime.patches import to_patches
from hemiola_runtime.pipeline import Size
from hemiola_runtime.program import lower_alone
from hemiola_runtime.report import TextReport
from hemiola_runtime.request import Request, by_image
from hemiola_runtime.slot import BoundProgram, Slot
from hemiola_runtime.text import PromptCache
from hemiola_runtime.tiles import decode_in_tiles


class Component:
    """One engine on a workspace of its own, shared by all requests; one run at a time, of one image or prompt."""

    def __init__(
        self, manifest: Manifest, name: str, engines: Mapping[str, Engine], backend: Backend, size: Size
    ) -> None:
        """Allocate what runs at sizes up to `size` need."""
        self._manifest = manifest
        self._name = name
        self._lock = threading.Lock()
        largest = lower_alone(manifest, name, 1, size)
        workspace = backend.workspace(largest.num_bytes, largest.staged_bytes)
        self._slot = Slot(workspace, engines, captures=False)

    def prepare(self, size: Size) -> None:
        """Do ahead what the first run at some size would do."""
        with self._lock:
            self._bound(size)

    def _bound(self, size: Size) -> BoundProgram:
        key = (self._name, 1, size)
        if (program := self._slot.prepared(key, as_one=False)) is not None:
            return program
        return self._slot.prepare(key, lambda: lower_alone(self._manifest, *key), as_one=False)

    def run(self, size: Size, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Run the engine on its inputs by name, at some size; returns its outputs by name."""
        with self._lock:
            try:
                program = self._bound(size)
                self._slot.begin(program, inputs)
                program.run()
                return program.read_results()
            finally:
                self._slot.settle()

    def close(self) -> None:
        """Free the workspace."""
        with self._lock:
            self._slot.close()


class Components:
    """What a sampler has beside its trajectories: prompts become embeddings, large latents become pictures."""

    def __init__(
        self, manifest: Manifest, files: Mapping[str, bytes], engines: Mapping[str, Engine], backend: Backend
    ) -> None:
        """Allocate the workspaces of those that the bundle has.

        Raises:
            BundleError: the tokenizer cannot be read.
        """
        self._pipeline = manifest.pipeline
        self._owned = ExitStack()
        self._components: dict[str, Component] = {}
        self._prompts: PromptCache | None = None
        with self._owned:
            for name, size in _largest(manifest).items():
                self._components[name] = Component(manifest, name, engines, backend, size)
                self._owned.callback(self._components[name].close)
            if TEXT_ENCODER in self._components:
                self._prompts = PromptCache(files[TOKENIZER_FILE], self._encode)
            self._owned = self._owned.pop_all()

    @staticmethod
    def num_bytes(manifest: Manifest) -> list[int]:
        """Return the bytes of each one's workspace."""
        return [lower_alone(manifest, name, 1, size).num_bytes for name, size in _largest(manifest).items()]

    def conditions(self, request: Request) -> tuple[dict[str, NDArray[Any]], TextReport | None]:
        """Return what images are drawn of as conditioning reads it, and what the report says of prompts.

        Raises:
            RequestError: a prompt cannot be encoded.
        """
        if request.labels is not None:
            return {"labels": request.labels}, None
        assert self._prompts is not None
        prompts = request.texts
        embedded = self._prompts.embed(prompts)
        truncated = {prompts[cut.index]: cut.num_tokens for cut in embedded.truncations}
        unknown = {prompt: pieces for prompt, pieces in zip(prompts, embedded.unknown, strict=True) if pieces}
        report = TextReport(embedded.num_kept, embedded.num_encoded, truncated, unknown)
        return by_image(embedded, request.batch_size), report

    def prepare(self) -> None:
        """Do ahead what the first prompt, and the first large picture of the default size, would do."""
        size = self._pipeline.size
        for name, component in self._components.items():
            if name == TEXT_ENCODER or self._pipeline.is_tiled(size):
                component.prepare(size if name == TEXT_ENCODER else self._pipeline.tile_of(size))

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Decode latents (B, C, H, W) tile by tile; returns pictures (B, height, width, channels) in [0, 1].

        Raises:
            NumericError: the decoder wrote NaN or infinity.
        """
        pipeline, size = self._pipeline, (latents.shape[2], latents.shape[3])
        tile = pipeline.tile_of(size)
        rows, columns = pipeline.grid_of(tile)
        side = pipeline.patch_size

        def decode_tile(part: NDArray[np.float32]) -> NDArray[np.float32]:
            patches = to_patches(part, side).reshape(1, rows, columns, side, side, -1)
            return self._components[VAE_DECODER].run(tile, latents=patches)["images"]

        pictures = decode_in_tiles(latents, tile, pipeline.image_shape(size), decode_tile)
        if not np.isfinite(pictures).all():
            raise NumericError(
                f"`{VAE_DECODER}` wrote NaN or infinity for a tile of finite latents. A bundle in bf16 or fp32 has "
                "more room than one in fp16"
            )
        return pictures

    def close(self) -> None:
        """Free all workspaces."""
        self._owned.close()

    def _encode(self, token_ids: NDArray[np.int64], mask: NDArray[np.float32]) -> NDArray[np.float32]:
        outputs = self._components[TEXT_ENCODER].run(self._pipeline.size, token_ids=token_ids, text_mask=mask)
        return outputs["text_embeddings"]


def _largest(manifest: Manifest) -> dict[str, Size]:
    """Name the engines that run by themselves, with the largest size that they run at."""
    pipeline = manifest.pipeline
    found = {TEXT_ENCODER: pipeline.size} if TEXT_ENCODER in manifest.engines else {}
    if VAE_DECODER in manifest.engines and pipeline.is_tiled(pipeline.max_size):
        found[VAE_DECODER] = pipeline.tile_of(pipeline.max_size)
    return found
