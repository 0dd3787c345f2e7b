"""The memory plan: what a bundle will need, known before anything is loaded, and refused early if it does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hemiola_runtime.artifacts import in_words
from hemiola_runtime.backends import entry_of
from hemiola_runtime.errors import CapacityError
from hemiola_runtime.graphs import TEXT_ENCODER, VAE_DECODER, WEIGHTS_FILE
from hemiola_runtime.manifest import Manifest


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes that serving a bundle takes.

    Attributes:
        weights_bytes: shared by all engines and requests.
        workspace_bytes: caches, modulation tables and solver state of one request at the largest batch size.
        activation_bytes: estimate of the intermediate tensors of the largest engine, for one request.
        max_concurrency: requests that run at once.
        components_bytes: of the text encoder and the decoder of tiles, which all requests share.
        num_components: how many of these there are.
    """

    weights_bytes: int
    workspace_bytes: int
    activation_bytes: int
    max_concurrency: int
    components_bytes: int = 0
    num_components: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        of_requests = self.max_concurrency * (self.workspace_bytes + self.activation_bytes)
        return self.weights_bytes + self.components_bytes + of_requests

    def __str__(self) -> str:
        components = f"{in_words(self.components_bytes)} text and tiles + " if self.components_bytes else ""
        return (
            f"{in_words(self.total_bytes)} = {in_words(self.weights_bytes)} weights + {components}"
            f"{self.max_concurrency} × "
            f"({in_words(self.workspace_bytes)} caches and states + {in_words(self.activation_bytes)} activations)"
        )

    def check(self, available_bytes: int | None) -> None:
        """Refuse a plan that does not fit, before anything is loaded.

        Args:
            available_bytes: free memory where engines run, None if unknown.

        Raises:
            CapacityError: with the numbers.
        """
        self._refuse_beyond(self.total_bytes, available_bytes, "")

    def with_activation(self, activation_bytes: int) -> MemoryPlan:
        """Return the plan with the engines' own word on the intermediate tensors of any workspace."""
        components_bytes = self.components_bytes + self.num_components * activation_bytes
        return replace(self, activation_bytes=activation_bytes, components_bytes=components_bytes)

    def check_workspaces(self, available_bytes: int | None) -> None:
        """Refuse workspaces that do not fit, once the weights are loaded.

        Raises:
            CapacityError: with the numbers.
        """
        self._refuse_beyond(self.total_bytes - self.weights_bytes, available_bytes, " (the weights are loaded)")

    def _refuse_beyond(self, wanted_bytes: int, available_bytes: int | None, when: str) -> None:
        if available_bytes is not None and wanted_bytes > available_bytes:
            raise CapacityError(
                f"the bundle needs {self}, but {in_words(available_bytes)} are free{when}. "
                "Lower max_concurrency, or build with a smaller --max-batch-size"
            )


def plan_memory(
    manifest: Manifest, workspace_bytes: int, max_concurrency: int, components: Sequence[int] = ()
) -> MemoryPlan:
    """Add up what serving takes; `components` are the bytes of each workspace that all requests share."""
    images = manifest.max_batch_size
    rows = images * manifest.pipeline.rows_per_image
    count = {VAE_DECODER: images, TEXT_ENCODER: 1}  # a decoder's row is an image, a text encoder's a prompt
    activation = max(count.get(name, rows) * graph.activation_bytes_per_row for name, graph in manifest.graphs.items())
    return MemoryPlan(
        _weights_bytes(manifest), workspace_bytes, activation, max_concurrency, sum(components), len(components)
    )


def _weights_bytes(manifest: Manifest) -> int:
    """Add up weights: within the engine files, or in the weight file, once or once for every engine."""
    if not manifest.uses_weight_file:
        return sum(manifest.files[graph.file].num_bytes for graph in manifest.graphs.values())
    if entry_of(manifest.backend.name).copies_weights:
        return sum(weight.num_bytes for graph in manifest.graphs.values() for weight in graph.weights)
    return sum(file.num_bytes for path, file in manifest.files.items() if path.endswith(WEIGHTS_FILE))


def available_host_bytes() -> int | None:
    """Return the host memory that is free for new work, None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None
