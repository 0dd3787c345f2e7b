"""What export says about its folder: `graphs.json`. Standard library alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.codec import write_json
from hemiola_runtime.folders import check_path, read_description
from hemiola_runtime.graphs import PRECISIONS, GraphFormat, GraphSpec
from hemiola_runtime.pipeline import Pipeline

GRAPHS_FILE: Final = "graphs.json"
REFERENCE_FILE: Final = "reference.npz"
TOKENIZER_FILE: Final = "tokenizer.json"  # of a model that draws prompts
UNCACHED: Final = "full"  # name of the schedule that computes everything at every step; every bundle has it


@dataclass(frozen=True, slots=True)
class Graphs:
    """The graphs of one precision, over one weight file.

    Attributes:
        graphs: by name; their files lie in a folder called by the precision, beside their weights.
        weights_sha256: of the weight file that they share.
    """

    graphs: dict[str, GraphSpec]
    weights_sha256: str


@dataclass(frozen=True, slots=True)
class GraphSet:
    """The folder that export leaves: graphs and weights in one precision or several, schedules, solver tables.

    Attributes:
        schema: of the file, now 4.
        pipeline: what the graphs compute.
        format: of the graphs' files: ONNX, or PyTorch's exported programs, which only its own compiler builds from.
        precisions: the graphs, by precision.
        schedules: name → file; the first is the one that runs unless another is asked for.
        solvers: digest of the scheduler → file.
        has_reference: whether there are images that PyTorch drew, by which engines are judged.
        made_by: command and versions.
    """

    schema: Literal[4]
    pipeline: Pipeline
    format: GraphFormat
    precisions: dict[str, Graphs]
    schedules: dict[str, str]
    solvers: dict[str, str]
    has_reference: bool
    made_by: MadeBy

    def __post_init__(self) -> None:
        if not self.precisions or not set(self.precisions) <= set(PRECISIONS):
            raise ValueError(
                f"graphs are {', '.join(PRECISIONS)}, not {', '.join(self.precisions) or 'of no precision'}"
            )
        named = [graph.file for part in self.precisions.values() for graph in part.graphs.values()]
        for path in (*named, *self.schedules.values(), *self.solvers.values()):
            check_path(path)


def read_graph_set(folder: Path) -> GraphSet:
    """Read what export says about its folder.

    Raises:
        BundleError: there is nothing of the kind, or it is not valid.
    """
    return read_description(GraphSet, folder / GRAPHS_FILE, "`hemiola export` writes such folders")


def write_graph_set(graphs: GraphSet, folder: Path) -> None:
    """Write what export says about its folder, atomically."""
    write_json(graphs, folder / GRAPHS_FILE)
