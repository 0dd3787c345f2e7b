from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Final

import diffusers
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bundles import Made, make_bundle, schedule_from_rhythm
from hemiola_export.model import load_model
from hemiola_runtime.results import Result
from hemiola_runtime.sampler import Sampler
from hemiola_search.judge import Judge
from hemiola_search.laboratory import HELD_OUT_SEED

SCRIPTS: Final = Path(__file__).parents[1] / "scripts"
FIRST_SEED: Final = 2_000_000
NUM_FEATURES: Final = 3

Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a judge of pictures of 8 × 8: three features by chance, of which the largest is the label."""
    judge = tmp_path / "model" / "judge"
    judge.mkdir(parents=True)
    drawn = np.random.default_rng(0).normal(size=(64, NUM_FEATURES)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "drawn"], ["features"]),
        helper.make_node("Identity", ["features"], ["logits"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["B", 8, 8, 1])
    written = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", NUM_FEATURES]) for name in ("logits", "features")
    ]
    graph = helper.make_graph(nodes, "judge", [images], written, [numpy_helper.from_array(drawn, "drawn")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(proto, judge / "judge.onnx")
    np.savez(judge / "statistics.npz", mean=np.zeros(NUM_FEATURES), covariance=np.eye(NUM_FEATURES))
    return judge.parent


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every request that is made, as its arguments."""
    made: list[dict[str, Any]] = []
    generate = Sampler.generate

    def recorded(sampler: Sampler, **arguments: Any) -> Result:
        made.append(arguments)
        return generate(sampler, **arguments)

    monkeypatch.setattr(Sampler, "generate", recorded)
    return made


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_frechet")


@pytest.fixture
def bench(script: ModuleType, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The script, called with bundles and arguments; returns what it writes."""
    out = tmp_path / "figures" / "frechet.json"

    def run(*arguments: object) -> dict[str, Any]:
        command = ["bench_frechet.py", "--model", model, "--out", out, *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        script.main()
        written: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return written

    return run


def _seeds(requests: list[dict[str, Any]], schedule: str) -> list[int]:
    return [seed for request in requests if request["schedule"] == schedule for seed in request["seeds"]]


def test_figures_are_the_judges_of_what_the_engines_draw(
    unguided: Made, bench: Bench, model: Path, requests: list[dict[str, Any]]
) -> None:
    record = bench(unguided.bundle, "--images", 22)
    assert list(record["schedules"]) == ["short", "full"]
    drawn = requests[:]
    judge, labels = Judge(model / "judge"), [i % 10 for i in range(22)]
    with Sampler.open(unguided.bundle) as sampler:
        parts = [
            sampler.generate(labels=labels[i : i + 2], seeds=FIRST_SEED + i, schedule="short").images
            for i in range(0, 22, 2)
        ]
    read, features = judge.look(np.concatenate(parts) / np.float32(255))
    row = record["schedules"]["short"]
    assert (row["sampler"], row["num_images"]) == ("EulerDiscrete-4", 22)
    assert row["agreement"] == pytest.approx(np.mean(read == labels))
    assert row["agreement_interval"][0] <= row["agreement"] <= row["agreement_interval"][1]
    assert row["frechet"] == pytest.approx(judge.frechet(features), rel=1e-4)
    # fifths of 5, 5, 4, 4 and 4 images, in order: all have more than the 3 features
    assert row["frechet_of_fifths"][:2] == pytest.approx(
        [judge.frechet(features[:5]), judge.frechet(features[5:10])], rel=1e-4
    )
    assert row["frechet_std_of_fifths"] == pytest.approx(np.std(row["frechet_of_fifths"], ddof=1))
    assert {"machine", "backend", "made_by", "note", "judge"} <= set(record)
    assert [label for request in drawn[:11] for label in request["labels"]] == labels


def test_no_seed_is_one_of_a_search(unguided: Made, bench: Bench, requests: list[dict[str, Any]]) -> None:
    bench(unguided.bundle, "--images", 6)
    assert _seeds(requests, "short") == _seeds(requests, "full") == list(range(FIRST_SEED, FIRST_SEED + 6))
    assert HELD_OUT_SEED + 100_000 < FIRST_SEED


@pytest.fixture(scope="module")
def longer(unguided: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The same model with other schedules, for three images at once."""
    model = load_model(str(unguided.model))
    solver = diffusers.EulerDiscreteScheduler.from_config(model.scheduler.config)
    schedule = schedule_from_rhythm(model, solver, "FCCFC", guidance="none")
    return make_bundle(tmp_path_factory.mktemp("longer"), unguided.model, {"long": schedule}, max_batch_size=3)


def test_several_bundles_share_a_record_and_the_first_draws_what_they_have_in_common(
    unguided: Made, longer: Made, bench: Bench, requests: list[dict[str, Any]]
) -> None:
    alone = {name: bench(made.bundle, "--images", 6)["schedules"] for made, name in ((unguided, "a"), (longer, "b"))}
    requests.clear()
    both = bench(unguided.bundle, longer.bundle, "--images", 6)["schedules"]
    assert both == alone["a"] | {"long": alone["b"]["long"]}
    assert list(both) == ["short", "full", "long"]
    assert not requests
    bench(unguided.bundle, longer.bundle, "--images", 8, "--schedule", "long", "--schedule", "full")
    assert [(request["schedule"], len(request["seeds"])) for request in requests] == [("long", 2), ("full", 2)]


def test_bundles_of_two_models_are_not_compared(unguided: Made, latent: Made, bench: Bench) -> None:
    with pytest.raises(SystemExit, match="the bundles differ in model"):
        bench(unguided.bundle, latent.bundle, "--images", 6)


def test_distances_of_too_few_images_are_none(unguided: Made, bench: Bench) -> None:
    row = bench(unguided.bundle, "--images", 15, "--schedule", "short")["schedules"]["short"]
    assert row["frechet"] is not None
    assert row["frechet_of_fifths"] == [None] * 5  # 3 images each, and 3 features
    assert row["frechet_std_of_fifths"] is None


def test_an_interrupted_run_goes_on_where_it_was(
    unguided: Made, bench: Bench, requests: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--images", 12)
    generate = Sampler.generate

    def interrupted(sampler: Sampler, **arguments: Any) -> Result:
        if len(requests) == 7:  # six of `short`, and one of `full`
            raise KeyboardInterrupt
        return generate(sampler, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "generate", interrupted)
        with pytest.raises(SystemExit, match="interrupted; the same command goes on"):
            bench(unguided.bundle, *asked)
    folder = tmp_path / "figures"
    assert [path.name for path in folder.iterdir()] == ["frechet.npz"]

    requests.clear()
    resumed = bench(unguided.bundle, *asked)["schedules"]
    assert not _seeds(requests, "short")
    assert _seeds(requests, "full") == list(range(FIRST_SEED + 2, FIRST_SEED + 12))
    (folder / "frechet.npz").unlink()
    assert bench(unguided.bundle, *asked)["schedules"] == resumed


def test_more_images_draw_only_those_that_are_new(unguided: Made, bench: Bench, requests: list[dict[str, Any]]) -> None:
    few = bench(unguided.bundle, "--images", 7, "--schedule", "short")
    requests.clear()
    more = bench(unguided.bundle, "--images", 9, "--schedule", "short")
    assert _seeds(requests, "short") == [FIRST_SEED + 7, FIRST_SEED + 8]
    assert more["schedules"]["short"]["num_images"] == 9
    requests.clear()
    assert bench(unguided.bundle, "--images", 7, "--schedule", "short")["schedules"] == few["schedules"]
    assert not requests


def test_another_judge_sees_the_images_anew(
    unguided: Made, bench: Bench, model: Path, requests: list[dict[str, Any]]
) -> None:
    bench(unguided.bundle, "--images", 5, "--schedule", "short")
    requests.clear()
    np.savez(model / "judge" / "statistics.npz", mean=np.ones(NUM_FEATURES), covariance=np.eye(NUM_FEATURES))
    bench(unguided.bundle, "--images", 5, "--schedule", "short")
    assert len(_seeds(requests, "short")) == 5


def test_a_model_of_prompts_draws_those_of_its_judge_in_turn(tmp_path: Path, script: ModuleType) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps({"a red circle": 0, "a blue square": 2}))
    pipeline = SimpleNamespace(text=object())
    subjects = script.subjects_of(SimpleNamespace(manifest=SimpleNamespace(pipeline=pipeline)), tmp_path)
    assert subjects.answers == [0, 2]
    drawn = ["a blue square", "a red circle", "a blue square"]
    assert subjects.request(1, 4) == {"prompts": drawn, "seeds": [FIRST_SEED + 1, FIRST_SEED + 2, FIRST_SEED + 3]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--schedule", "other"), "no bundle has a schedule 'other'; there are short, full"),
        (("--model", "nowhere"), "holds no judge that can be used"),
    ],
)
def test_what_the_bundle_or_the_model_lacks_is_refused(
    arguments: tuple[str, ...], said: str, unguided: Made, bench: Bench, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=said):
        bench(unguided.bundle, "--images", 5, *arguments)
    assert not (tmp_path / "figures").exists()


def test_a_damaged_file_of_features_is_refused_and_kept(unguided: Made, bench: Bench, tmp_path: Path) -> None:
    kept = tmp_path / "figures" / "frechet.npz"
    kept.parent.mkdir()
    kept.write_bytes(b"no archive at all")
    with pytest.raises(SystemExit, match=r"frechet\.npz cannot be read.*Remove it"):
        bench(unguided.bundle, "--images", 5)
    assert kept.read_bytes() == b"no archive at all"


def test_fewer_images_than_fifths_are_a_wrong_use(
    unguided: Made, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench(unguided.bundle, "--images", 4)
    assert "--images is 5 or more" in capsys.readouterr().err
