from __future__ import annotations

import pickle
import socket
import sys
import time
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from commands import refused
from hemiola.cli import main
from hemiola_export.model import Model, load_model
from hemiola_runtime.schedule import read_schedule
from hemiola_search import pretrained
from hemiola_search.budget import budget_from_text
from hemiola_search.errors import SearchError
from hemiola_search.laboratory import Images, Site
from hemiola_search.perceptual import Perception
from hemiola_search.pretrained import CLIP, METRICS, Clip
from hemiola_search.problems import problem_for
from hemiola_search.record import read_record
from hemiola_search.tasks import Subjects
from labs import OPTIONS
from models import save_tiny_model, save_tiny_text_model, tiny_dit, tiny_pixart

SIDE: Final = 64
REVISION: Final = "0" * 40


class FakeLpips:
    """The mean difference of each pair."""

    def __init__(self, network: str, *, reduction: str, normalize: bool) -> None:
        assert (network, reduction, normalize) == ("alex", "none", True)
        self.scores: list[Tensor] = []

    def to(self, device: str) -> FakeLpips:
        return self

    def reset(self) -> None:
        self.scores = []

    def update(self, mine: Tensor, theirs: Tensor) -> None:
        assert mine.dtype == theirs.dtype == torch.float32
        assert mine.shape[1:] == theirs.shape[1:] == (3, SIDE, SIDE)
        assert 0 <= mine.min() <= mine.max() <= 1
        self.scores.append((mine - theirs).abs().mean(dim=(1, 2, 3)))

    def compute(self) -> Tensor:
        return torch.cat(self.scores)


class FakeClipScore:
    """The length of the prompt."""

    def __init__(self, network: Any) -> None:
        self.network = network

    def to(self, device: str) -> FakeClipScore:
        return self

    def reset(self) -> None:
        """Nothing is kept."""

    def __call__(self, picture: Tensor, prompt: str) -> Tensor:
        assert picture.dtype == torch.uint8
        assert picture.shape == (3, SIDE, SIDE)
        return torch.tensor(float(len(prompt)))


class FakeFid:
    """The difference of mean brightness, in steps of a byte."""

    def __init__(self, *, reset_real_features: bool, antialias: bool) -> None:
        assert not reset_real_features
        assert not antialias
        self.real_features_num_samples = 0
        self.real_sum = 0.0
        self.reset()

    def to(self, device: str) -> FakeFid:
        return self

    def reset(self) -> None:
        self.count, self.sum = 0, 0.0

    def update(self, pictures: Tensor, *, real: bool) -> None:
        assert pictures.dtype == torch.uint8
        assert pictures.shape[1] == 3
        total = float(pictures.double().mean(dim=(1, 2, 3)).sum())
        if real:
            self.real_features_num_samples += len(pictures)
            self.real_sum += total
        else:
            self.count, self.sum = self.count + len(pictures), self.sum + total

    def compute(self) -> float:
        return self.sum / self.count - self.real_sum / self.real_features_num_samples


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of weights, empty; whoever calls for a network fails the test."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path


@pytest.fixture
def unpackaged(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, where metrics need no package."""
    for name in METRICS:
        monkeypatch.setitem(METRICS, name, replace(METRICS[name], packages=()))
    return caches


@pytest.fixture
def fakes(unpackaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for torchmetrics, with files where weights are looked for."""
    contents: dict[str, dict[str, Any]] = {
        "torchmetrics": {},
        "torchmetrics.image": {},
        "torchmetrics.image.lpip": {"LearnedPerceptualImagePatchSimilarity": FakeLpips},
        "torchmetrics.image.fid": {"FrechetInceptionDistance": FakeFid},
        "torchmetrics.multimodal": {},
        "torchmetrics.multimodal.clip_score": {"CLIPScore": FakeClipScore},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(pretrained, "Clip", lambda folder: folder)
    checkpoints = unpackaged / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name in ("lpips", "fid"):
        (checkpoints / METRICS[name].files[0]).touch()
    snapshot = _snapshot(unpackaged / "hf")
    for file in METRICS["clip_score"].files:
        (snapshot / file).touch()


def _snapshot(cache: Path) -> Path:
    """Make the folder in which the hub's library keeps CLIP."""
    folder = cache / f"models--{CLIP.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    (folder / "snapshots" / REVISION).mkdir(parents=True)
    return folder / "snapshots" / REVISION


def _save_pictures(folder: Path, *levels: int) -> Path:
    """Write grey pictures of these brightnesses, each of another size."""
    folder.mkdir()
    for i, level in enumerate(levels):
        Image.new("L", (SIDE + i, SIDE), level).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random PixArt of pixels that draws RGB pictures of 64 × 64."""
    transformer = tiny_pixart(num_blocks=2, channels=3, sample_size=SIDE, patch_size=16, has_learned_sigma=False)
    folder = tmp_path_factory.mktemp("perceptual") / "model"
    return save_tiny_text_model(folder, transformer=transformer, has_vae=False)


@pytest.fixture(scope="module")
def text_model(text_folder: Path) -> Model:
    return load_model(str(text_folder))


def _label_model(folder: Path, *, channels: int, side: int, has_vae: bool = False) -> Model:
    transformer = tiny_dit(num_blocks=1, channels=channels, sample_size=side, patch_size=side // 4)
    return load_model(str(save_tiny_model(folder / "model", transformer=transformer, has_vae=has_vae)))


def test_metrics_that_were_asked_for_stand_in_schedule_and_record(
    text_folder: Path, fakes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\na green triangle left of a red circle\na blue circle\n")
    out = tmp_path / "found" / "schedule.json"
    search = [
        *("search", text_folder, "--prompts", prompts, "--out", out, "--strategy", "uniform"),
        *("--steps", 4, "--budget", 2, "--images", 1, "--held-out", 3),
    ]
    real = _save_pictures(tmp_path / "real", 100, 102, 104)
    metrics = ["--metric", "fid", "--metric", "lpips", "--metric", "clip_score", "--real-images", real]
    assert main([*map(str, search), *map(str, metrics)]) == 0
    assert "warning: fid of 3 held-out images" in capsys.readouterr().err
    record = read_record(out.with_name("search.json"))
    assert len(record.held_out) >= 2
    for point in record.points:
        assert ({"lpips", "clip_score", "fid"} <= set(point.quality)) == (point.images == "held_out")
    uncached, *others = record.held_out
    assert uncached.quality["lpips"] == 0
    assert all(point.quality["lpips"] > 0 for point in others if point.quality["relative_l2"])
    assert len({point.quality["fid"] for point in record.held_out}) > 1
    length = sum(map(len, record.prompts)) / 3
    assert all(point.quality["clip_score"] == pytest.approx(length) for point in record.held_out)
    chosen = next(point for point in others if point.key == record.chosen)
    low, high = chosen.intervals["lpips"]
    assert low <= chosen.quality["lpips"] <= high
    assert "fid" not in chosen.intervals
    assert read_schedule(out).measured.items() >= chosen.quality.items()
    assert main(["inspect", str(out)]) == 0
    assert "lpips" in capsys.readouterr().out

    # Another choice of metrics: nothing that was scored for the first is taken for it.
    assert main([*map(str, search), "--metric", "lpips"]) == 0
    again = read_record(out.with_name("search.json"))
    assert all("fid" not in point.quality for point in again.points)
    assert [point.quality["lpips"] for point in again.held_out] == [p.quality["lpips"] for p in record.held_out]


def test_figures_are_those_of_the_pictures_they_stand_beside(fakes: None, tmp_path: Path) -> None:
    perception = Perception(["clip_score", "lpips", "fid"], _save_pictures(tmp_path / "real", 90, 110))
    uncached = np.full((20, SIDE, SIDE, 3), 0.5, dtype=np.float32)  # more than go through a network at once
    images = uncached + np.linspace(0, 0.19, 20, dtype=np.float32)[:, None, None, None]
    prompts = ["x" * i for i in range(20)]
    samples, totals = perception.look(images, uncached, prompts)
    assert samples["lpips"] == pytest.approx(np.linspace(0, 0.19, 20), abs=1e-6)
    assert samples["clip_score"] == tuple(range(20))
    # 0.5 to 0.69 in bytes, 0.595 · 255 on the mean, from real images of 100
    assert totals == {"fid": pytest.approx(0.595 * 255 - 100, abs=0.1)}
    assert perception.look(uncached, uncached, prompts)[1] == {"fid": pytest.approx(28)}  # 0.5 is rounded to 128
    assert pickle.loads(pickle.dumps(perception)).look(images, uncached, prompts) == (samples, totals)


def test_only_held_out_figures_depend_on_metrics(text_model: Model, fakes: None, tmp_path: Path) -> None:
    options = replace(OPTIONS, num_images=1, num_held_out=2)
    problem = problem_for(text_model, text_model.scheduler, 4, options, budget_from_text("2"))
    some, other = _save_pictures(tmp_path / "some", 1, 2), _save_pictures(tmp_path / "other", 1, 3)

    def context(images: Images, perception: Perception | None) -> str:
        return Site(text_model, problem, Subjects(("a red circle",)), None, images, perception).context

    perceptions = [None, Perception(["lpips"], None), Perception(["fid"], some), Perception(["fid"], other)]
    assert len({context("held_out", perception) for perception in perceptions}) == 4
    same = [Perception(["lpips", "fid"], some), Perception(["fid", "lpips", "fid"], some)]
    assert len({context("held_out", perception) for perception in same}) == 1


@pytest.mark.parametrize("name", METRICS)
def test_a_package_that_is_missing_is_named_before_a_model_is_loaded(
    name: str, caches: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(METRICS, name, replace(METRICS[name], packages=("no_such_package",)))
    said = refused(capsys, "search", "nowhere", "--out", caches / "schedule.json", *_asked(name, caches))
    assert f"{name} needs no_such_package: pip install 'hemiola[metrics]'" in said


def _asked(name: str, folder: Path) -> list[object]:
    real = ["--real-images", _save_pictures(folder / "real", 1, 2)] if name == "fid" else []
    return ["--metric", name, *real]


PLACES: Final = {
    "lpips": ("torch/hub/checkpoints", "TORCH_HOME", "torchvision"),
    "fid": ("torch/hub/checkpoints", "TORCH_HOME", "torchmetrics"),
    "clip_score": ("hf/models--openai--clip-vit-large-patch14", "HF_HOME", f"hf download {CLIP}"),
}


@pytest.mark.parametrize("name", METRICS)
def test_weights_that_are_missing_are_named_at_once_with_what_fetches_them(
    name: str, unpackaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _check_weights_are_refused(name, unpackaged, capsys)


@pytest.mark.parametrize("name", METRICS)
def test_weights_that_are_missing_are_not_fetched_by_the_libraries(
    name: str, caches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if absent := [package for package in METRICS[name].packages if find_spec(package) is None]:
        pytest.skip(f"{absent} are not installed")
    _check_weights_are_refused(name, caches, capsys)


def _check_weights_are_refused(name: str, caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["search", "nowhere", "--out", caches / "schedule.json", *_asked(name, caches)]
    start = time.process_time()  # of this process alone, whatever else the machine does; it waits for no network
    said = refused(capsys, *arguments)
    assert time.process_time() - start < 1
    place, variable, command = PLACES[name]
    assert all(part in said for part in (METRICS[name].files[0], str(caches / place), variable, command))
    assert not (caches / "schedule.json").exists()


def test_weights_have_the_names_under_which_the_libraries_look_for_them() -> None:
    try:
        inception = import_module("torch_fidelity.feature_extractor_inceptionv3")
        torchvision = import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:  # the latter of a torchvision for another build of PyTorch
        pytest.skip(str(error))
    assert inception.URL_INCEPTION_V3.endswith("/" + METRICS["fid"].files[0])
    assert torchvision.AlexNet_Weights.DEFAULT.url.endswith("/" + METRICS["lpips"].files[0])


def test_weights_that_are_damaged_are_refused_with_what_fetches_them(
    fakes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("unexpected end\nof file")

    monkeypatch.setattr(sys.modules["torchmetrics.image.lpip"], "LearnedPerceptualImagePatchSimilarity", fail)
    with pytest.raises(SearchError, match=r"lpips cannot be opened: unexpected end of file.*alexnet"):
        Perception(["lpips"], None)


@pytest.mark.parametrize(
    ("channels", "side", "has_vae", "said"),
    [
        (1, 64, False, "draws 64×64×1"),
        (3, 32, False, "draws 32×32×3"),
        (4, 8, True, "draws 16×16×3"),
    ],
)
def test_pictures_that_the_networks_do_not_know_are_refused(
    channels: int, side: int, has_vae: bool, said: str, fakes: None, tmp_path: Path
) -> None:
    model = _label_model(tmp_path, channels=channels, side=side, has_vae=has_vae)
    with pytest.raises(SearchError, match=said):
        Perception(["lpips"], None).check_model(model)


def test_labels_have_no_clip_score(fakes: None, tmp_path: Path) -> None:
    model = _label_model(tmp_path, channels=3, side=SIDE)
    Perception(["lpips"], None).check_model(model)
    with pytest.raises(SearchError, match="draws labels"):
        Perception(["lpips", "clip_score"], None).check_model(model)


def test_a_small_model_is_refused_before_anything_is_drawn(
    fakes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _label_model(tmp_path, channels=3, side=32)
    said = refused(capsys, "search", tmp_path / "model", "--out", tmp_path / "schedule.json", "--metric", "lpips")
    assert "64×64 pixels and more" in said
    assert not (tmp_path / "search.sqlite").exists()


@pytest.mark.parametrize("names", [["fid"], ["lpips"], []])
def test_fid_and_real_images_go_together(names: list[str], fakes: None, tmp_path: Path) -> None:
    real = None if "fid" in names else _save_pictures(tmp_path / "real", 1, 2)
    with pytest.raises(SearchError, match="go together"):
        Perception(names, real)


def test_real_images_are_looked_at_before_anything_is_drawn(fakes: None, tmp_path: Path) -> None:
    folder = _save_pictures(tmp_path / "real", 7)
    with pytest.raises(SearchError, match="holds 1 pictures"):
        Perception(["fid"], folder)
    (folder / "other.jpg").write_bytes(b"no picture at all")
    with pytest.raises(SearchError, match=r"other\.jpg is no picture"):
        Perception(["fid"], folder)


def test_clip_gives_tensors_and_cuts_long_prompts(tmp_path: Path) -> None:
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=9)
    tokenizer.save_pretrained(tmp_path)
    size = '{"height": 16, "width": 16}'
    (tmp_path / "preprocessor_config.json").write_text(
        f'{{"image_processor_type": "CLIPImageProcessor", "size": {{"shortest_edge": 16}}, "crop_size": {size}}}'
    )
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    text = {"vocab_size": len(words), "max_position_embeddings": 9, "projection_dim": 8, **ends, **shape}
    vision = {"image_size": 16, "patch_size": 8, "projection_dim": 8, **shape}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)

    clip = Clip(tmp_path)
    pictures = [torch.full((3, SIDE, SIDE), level, dtype=torch.uint8) for level in (0, 255)]
    seen = clip.process(images=pictures, return_tensors="pt", padding=True)["pixel_values"]
    assert seen.shape == (2, 3, 16, 16)
    assert clip.get_image_features(seen).shape == (2, 8)
    read = clip.process(text=["a b", "a red dog " * 60], return_tensors="pt", padding=True)
    assert read["input_ids"].shape == (2, 9)
    assert read["input_ids"][1, -1] == len(words) - 1  # the end of the prompt, which its features are taken from
    assert clip.get_text_features(read["input_ids"], read["attention_mask"]).shape == (2, 8)
