"""A judge of images: a classifier as an ONNX graph, and the statistics of its features on real images.

The folder of a model may hold one in `judge/`: `judge.onnx` maps images (B, height, width, channels) float32 in [0, 1]
to `logits` (B, classes) and `features` (B, F); `statistics.npz` holds `mean` (F,) and `covariance` (F, F) of the
features of real images.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from hemiola_runtime.artifacts import sha256_of
from hemiola_search.errors import SearchError
from hemiola_search.quality import Floats, frechet_distance


class Judge:
    """Reads labels off images, and tells how far a set of images is from real ones.

    Attributes:
        digest: of its files.
    """

    def __init__(self, folder: Path) -> None:
        """Load the judge of a folder.

        Raises:
            SearchError: there is none, or it is not what this module's head describes.
        """
        try:
            self._graph = (folder / "judge.onnx").read_bytes()
            self._session = _session(self._graph)
            with np.load(io.BytesIO((folder / "statistics.npz").read_bytes()), allow_pickle=False) as statistics:
                self._mean, self._covariance = statistics["mean"], statistics["covariance"]
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise SearchError(f"{folder} holds no judge that can be used: {error}") from error
        if (found := [output.name for output in self._session.get_outputs()]) != ["logits", "features"]:
            raise SearchError(f"the judge in {folder} gives {found} instead of logits and features")
        size = self._mean.size
        if size < 2 or self._mean.shape != (size,) or self._covariance.shape != (size, size):
            raise SearchError(
                f"the judge in {folder} has a mean of shape {self._mean.shape} and a covariance of shape "
                f"{self._covariance.shape}, where (F,) and (F, F) belong together, of 2 features or more"
            )
        self._folder = folder
        self.digest = sha256_of(self._graph + (folder / "statistics.npz").read_bytes())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_session"}  # which cannot be sent

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._session = _session(self._graph)

    def look(self, images: Floats) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the label that is read off each image (n,), and its features (n, F)."""
        try:
            logits, features = self._session.run(None, {"images": images.astype(np.float32)})
        except Exception as error:  # as above
            raise SearchError(
                f"the judge in {self._folder} cannot look at images of shape {images.shape[1:]}: {error}"
            ) from error
        if features.shape[1:] != self._mean.shape:
            raise SearchError(
                f"the judge in {self._folder} sees {features.shape[1:]} features, but its statistics are of "
                f"{self._mean.shape}"
            )
        return np.argmax(logits, axis=1), features

    def frechet(self, features: Floats) -> float:
        """Return the Fréchet distance between features (n, F) and those of the real images."""
        return frechet_distance(features, self._mean, self._covariance)


def _session(graph: bytes) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    return ort.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
