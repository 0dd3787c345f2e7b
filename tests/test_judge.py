from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from hemiola_search.errors import SearchError
from hemiola_search.judge import Judge

CHANNELS = 3


def _write_graph(folder: Path, outputs: tuple[str, str] = ("logits", "features")) -> None:
    """Write a judge whose features are the mean of each channel; the brightest channel is the label."""
    logits, features = outputs
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2])
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], [features], keepdims=0),
        helper.make_node("Mul", [features, "ten"], [logits]),
    ]
    ten = helper.make_tensor("ten", TensorProto.FLOAT, [], [10.0])
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["B", "H", "W", CHANNELS])
    written = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", CHANNELS]) for name in outputs]
    graph = helper.make_graph(nodes, "judge", [images], written, [axes, ten])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "judge.onnx").write_bytes(model.SerializeToString())


def _write_statistics(folder: Path, **arrays: NDArray[np.float64]) -> None:
    np.savez(folder / "statistics.npz", allow_pickle=False, **arrays)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _write_graph(tmp_path)
    _write_statistics(tmp_path, mean=np.zeros(CHANNELS), covariance=np.eye(CHANNELS))
    return tmp_path


def test_the_label_with_the_largest_logit_is_read_off_each_image(folder: Path) -> None:
    images = np.zeros((4, 5, 6, CHANNELS))
    brightest = [2, 0, 1, 2]
    images[range(4), ..., brightest] = 0.5
    read, features = Judge(folder).look(images)
    assert read.tolist() == brightest
    np.testing.assert_allclose(features, 0.5 * np.eye(CHANNELS)[brightest], rtol=1e-6)


def test_the_distance_refers_to_the_statistics_of_the_folder(folder: Path) -> None:
    features = np.random.default_rng(0).normal(size=(50, CHANNELS))
    covariance = np.cov(features, rowvar=False)
    _write_statistics(folder, mean=features.mean(axis=0) + np.array([1.0, 2.0, 2.0]), covariance=covariance)
    assert Judge(folder).frechet(features) == pytest.approx(9.0)  # the same spread, 1² + 2² + 2² away


def _without_graph(folder: Path) -> None:
    (folder / "judge.onnx").unlink()


def _without_statistics(folder: Path) -> None:
    (folder / "statistics.npz").unlink()


def _with_half_a_graph(folder: Path) -> None:
    path = folder / "judge.onnx"
    path.write_bytes(path.read_bytes()[:40])


def _with_other_statistics(folder: Path) -> None:
    (folder / "statistics.npz").write_bytes(b"no archive at all")


def _without_covariance(folder: Path) -> None:
    _write_statistics(folder, mean=np.zeros(CHANNELS))


def _with_pickled_statistics(folder: Path) -> None:
    pickled = np.array([{"not": "numbers"}], dtype=object)
    np.savez(folder / "statistics.npz", allow_pickle=True, mean=pickled, covariance=np.eye(CHANNELS))


@pytest.mark.parametrize(
    "damage",
    [
        _without_graph,
        _without_statistics,
        _with_half_a_graph,
        _with_other_statistics,
        _without_covariance,
        _with_pickled_statistics,
    ],
)
def test_a_judge_that_is_not_whole_is_refused_by_its_folder(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    with pytest.raises(SearchError, match="holds no judge that can be used") as raised:
        Judge(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("outputs", [("features", "logits"), ("logits", "embedding"), ("scores", "features")])
def test_a_judge_with_other_outputs_is_refused_by_their_names(folder: Path, outputs: tuple[str, str]) -> None:
    _write_graph(folder, outputs)
    with pytest.raises(SearchError, match="instead of logits and features") as raised:
        Judge(folder)
    assert all(repr(name) in str(raised.value) for name in outputs)


def test_the_judge_of_these_tests_is_a_valid_graph(folder: Path) -> None:
    model = onnx.load(folder / "judge.onnx")
    onnx.checker.check_model(model)
    assert [value.name for value in model.graph.output] == ["logits", "features"]


def test_statistics_that_do_not_belong_together_are_refused(folder: Path) -> None:
    for mean, covariance in [(np.zeros(3), np.eye(2)), (np.zeros(1), np.eye(1)), (np.zeros((1, 3)), np.eye(3))]:
        _write_statistics(folder, mean=mean, covariance=covariance)
        with pytest.raises(SearchError, match=r"where \(F,\) and \(F, F\) belong together, of 2 features or more"):
            Judge(folder)


def test_statistics_of_other_features_than_the_graph_gives_are_refused(folder: Path) -> None:
    _write_statistics(folder, mean=np.zeros(2), covariance=np.eye(2))
    judge = Judge(folder)
    with pytest.raises(SearchError, match=r"sees \(3,\) features, but its statistics are of \(2,\)"):
        judge.look(np.zeros((1, 4, 4, CHANNELS)))


def test_images_that_the_graph_does_not_take_are_refused_by_their_shape(folder: Path) -> None:
    with pytest.raises(SearchError, match=r"cannot look at images of shape \(4, 4, 1\)"):
        Judge(folder).look(np.zeros((2, 4, 4, 1)))


def test_a_judge_that_was_sent_elsewhere_judges_alike(folder: Path) -> None:
    judge = Judge(folder)
    sent: Judge = pickle.loads(pickle.dumps(judge))
    images = np.random.default_rng(0).random((5, 4, 4, CHANNELS))
    for here, there in zip(judge.look(images), sent.look(images), strict=True):
        np.testing.assert_array_equal(here, there)
    assert sent.digest == judge.digest
    assert sent.frechet(images[:, 0, 0]) == judge.frechet(images[:, 0, 0])


def test_judges_of_other_files_have_other_digests(folder: Path) -> None:
    first = Judge(folder).digest
    assert Judge(folder).digest == first
    _write_statistics(folder, mean=np.ones(CHANNELS), covariance=np.eye(CHANNELS))
    second = Judge(folder).digest
    (folder / "judge.onnx").write_bytes(_doubled(folder / "judge.onnx"))
    assert len({first, second, Judge(folder).digest}) == 3


def _doubled(path: Path) -> bytes:
    """Return a judge that is twice as sure."""
    model = onnx.load(path)
    model.graph.initializer[1].float_data[0] = 20
    return bytes(model.SerializeToString())
