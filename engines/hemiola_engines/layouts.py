"""Layouts: which graphs become engines, and which engines make up each forward."""

from __future__ import annotations

from collections.abc import Mapping

from hemiola_engines.errors import BuildError
from hemiola_engines.options import Layout
from hemiola_runtime.graphs import FRONT, GraphSpec
from hemiola_runtime.schedule import KINDS, Forward


def arrange(graphs: Mapping[str, GraphSpec], layout: Layout) -> tuple[dict[str, GraphSpec], dict[str, tuple[str, ...]]]:
    """Choose the graphs that a layout needs, and the engines that make up each forward.

    Raises:
        BuildError: the graphs have no front and deep part.
    """
    forwards: dict[str, tuple[str, ...]] = {name: (name,) for name in graphs if name in KINDS}
    unused = FRONT
    if layout == "segmented":
        if FRONT not in graphs:
            raise BuildError(
                "the segmented layout puts `full` together from the shallow blocks and the engine of `deep`, but no "
                "schedule of this export has deep steps. Build with --layout separate, or export with such a schedule, "
                "as `hemiola search --selective deep` finds"
            )
        forwards[Forward.FULL.value] = (FRONT, Forward.DEEP.value)
        unused = Forward.FULL.value
    return {name: graph for name, graph in graphs.items() if name != unused}, forwards
