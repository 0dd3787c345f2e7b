"""Write a judge of pictures as `hemiola search` reads it: an ONNX graph, and the statistics of its features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn


def save_judge(judge: nn.Module, pictures: Tensor, folder: Path) -> None:
    """Write `judge.onnx` and `statistics.npz`.

    Args:
        judge: maps pictures (B, H, W, C) in [0, 1] to logits (B, classes) and features (B, F).
        pictures: (n, H, W, C), real ones; the statistics are mean and covariance of their features.
        folder: made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program = torch.onnx.export(
        judge,
        (pictures[:2],),
        input_names=["images"],
        output_names=["logits", "features"],
        dynamic_shapes={"images": {0: torch.export.Dim("B")}},
        opset_version=20,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:  # the exporter writes down where it ran
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        value.ClearField("metadata_props")
    proto.ClearField("metadata_props")
    proto.graph.ClearField("metadata_props")
    onnx.save(proto, folder / "judge.onnx")
    features = torch.cat([judge(part)[1] for part in pictures.split(500)]).double().numpy()
    np.savez(folder / "statistics.npz", mean=features.mean(0), covariance=np.cov(features, rowvar=False))
