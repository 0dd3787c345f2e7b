"""The pretrained networks of torchmetrics' perceptual metrics: what each needs, where it lies, how it is opened.

Weights are taken from where the libraries keep them and never fetched: a machine without a network says at once what
is missing, and by which command it is fetched elsewhere.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import constants, try_to_load_from_cache
from torch import Tensor, nn

from hemiola_search.errors import SearchError

CLIP: Final = "openai/clip-vit-large-patch14"  # torchmetrics' default
CLIP_FILES: Final = (
    *("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"),
)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a metric cannot do without.

    Attributes:
        packages: that it imports.
        files: of weights.
        fetch: the command that fetches them.
    """

    packages: tuple[str, ...]
    files: tuple[str, ...]
    fetch: str


METRICS: Final = {
    "lpips": Needs(
        ("torchmetrics", "torchvision"),
        ("alexnet-owt-7be5be79.pth",),
        "python -c \"from torchvision.models import alexnet; alexnet(weights='DEFAULT')\"",
    ),
    "clip_score": Needs(("torchmetrics", "transformers"), CLIP_FILES, f"hf download {CLIP} {' '.join(CLIP_FILES)}"),
    "fid": Needs(
        ("torchmetrics", "torch_fidelity"),
        ("weights-inception-2015-12-05-6726825d.pth",),
        'python -c "from torchmetrics.image.fid import FrechetInceptionDistance as F; F()"',
    ),
}


def check(name: str) -> None:
    """Make sure that a metric's packages and weights are there, without importing or fetching any.

    Raises:
        SearchError: they are not.
    """
    needs = METRICS[name]
    if missing := [package for package in needs.packages if importlib.util.find_spec(package) is None]:
        raise SearchError(f"{name} needs {' and '.join(missing)}: pip install 'hemiola[metrics]'")
    if name == "clip_score":
        folder, home = Path(constants.HF_HUB_CACHE) / f"models--{CLIP.replace('/', '--')}", "HF_HOME"
        known = [_cached(file) is not None for file in needs.files]
    else:
        folder, home = Path(torch.hub.get_dir()) / "checkpoints", "TORCH_HOME"
        known = [(folder / file).is_file() for file in needs.files]
    if not all(known):
        raise SearchError(
            f"{name} needs {needs.files[known.index(False)]}, which is not in {folder} ({home} moves it). Fetch it "
            f"where there is a network, and copy it there: {needs.fetch}"
        )


def opened(name: str) -> Any:
    """Return a metric of torchmetrics, with its network on a GPU where there is one.

    Raises:
        SearchError: what it needs is missing, damaged, or does not fit together.
    """
    check(name)
    try:
        metric = _metric(name)
    except Exception as error:  # three libraries and their files, which share no base class
        raise SearchError(
            f"{name} cannot be opened: {' '.join(str(error).split())}. Its packages and PyTorch have to belong "
            "together: pip install 'hemiola[metrics]'. Weights that are damaged have to be fetched again: "
            + METRICS[name].fetch
        ) from error
    return metric.to("cuda" if torch.cuda.is_available() else "cpu")


def _metric(name: str) -> Any:
    if name == "lpips":
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity("alex", reduction="none", normalize=True)
    if name == "clip_score":
        from torchmetrics.multimodal.clip_score import CLIPScore

        config = _cached(CLIP_FILES[0])
        assert config is not None, "it was checked"
        clip = Clip(config.parent)
        return CLIPScore(lambda: (clip, clip.process))
    from torchmetrics.image.fid import FrechetInceptionDistance

    # resized as the first implementation did it, by which published figures were taken
    return FrechetInceptionDistance(reset_real_features=False, antialias=False)


def _cached(file: str) -> Path | None:
    """Return where a file of CLIP's lies; None if it was not fetched."""
    found = try_to_load_from_cache(CLIP, file, constants.HF_HUB_CACHE)
    return Path(found) if isinstance(found, str) else None


class Clip(nn.Module):
    """CLIP as torchmetrics 1.9 calls it: features are tensors, which transformers 5 wraps, and long prompts are cut."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import CLIPModel, CLIPProcessor, utils

        utils.logging.disable_progress_bar()  # commands show their own
        self.model = CLIPModel.from_pretrained(folder)
        self.config = self.model.config
        self._processor = CLIPProcessor.from_pretrained(folder)

    def process(self, **inputs: Any) -> Any:
        """Turn pictures or prompts into what the network takes."""
        return self._processor(**inputs, **({"truncation": True} if "text" in inputs else {}))

    def get_image_features(self, pixels: Tensor) -> Tensor:
        """Return the features of pictures (n, F)."""
        features: Tensor = self.model.get_image_features(pixels).pooler_output
        return features

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the features of prompts (n, F)."""
        features: Tensor = self.model.get_text_features(ids, mask).pooler_output
        return features
