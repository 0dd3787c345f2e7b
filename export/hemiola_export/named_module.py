"""Modules from named tensors to named tensors: the shape in which everything is run, exported and bound."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from hemiola_runtime.graphs import TensorSpec

Tensors = dict[str, Tensor]


class NamedModule(nn.Module, ABC):
    """A module that says what it reads and writes. The names are those of its graph's inputs and outputs."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of the inputs."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of the outputs."""

    @property
    def example_sizes(self) -> dict[str, int]:
        """Numbers of those symbols for which tracing has no free choice."""
        return {}

    @abstractmethod
    def forward(self, tensors: Tensors) -> Tensors:
        """Map the inputs, by name, to the outputs."""
