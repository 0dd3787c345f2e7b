"""Open a diffusers folder, on disk or on the hub: transformer, scheduler, VAE, labels or text, and who it is."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import diffusers
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn

from hemiola_export.errors import ExportError
from hemiola_export.families import FAMILIES, Family, open_transformer
from hemiola_export.solver import config_from_identity, scheduler_identity
from hemiola_runtime.schedule import ModelIdentity, SchedulerIdentity

if TYPE_CHECKING:
    from hemiola_export.text_encoder import TextEncoder
    from hemiola_export.tokenizer import PromptTokenizer

logger = logging.getLogger(__name__)

# Short names of schedulers: diffusers class and the options that make it what people mean by the name.
SCHEDULERS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++3m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "euler": ("EulerDiscreteScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}


TEXT_TOKENS: Final[dict[str, int]] = {"PixArtSigmaPipeline": 300}  # S of pipelines that differ from PixArt-α's


@dataclass(frozen=True, slots=True)
class Model:
    """A diffusers pipeline, opened.

    Attributes:
        identity: what schedules for it are bound to.
        transformer: diffusers' module, float32.
        family: the same, opened at its seams.
        scheduler: the scheduler object that the folder names.
        vae: diffusers' AutoencoderKL, or None for a model of pixels.
        labels: class label → what people call it; empty where images are drawn of prompts.
        text: what prompts go through; None where images are drawn of labels.
    """

    identity: ModelIdentity
    transformer: Any
    family: Family
    scheduler: Any
    vae: Any | None
    labels: dict[str, str]
    text: Text | None = None

    @property
    def pixels_per_latent(self) -> int:
        """Side of the square of pixels that a latent becomes; 1 for a model of pixels."""
        return 1 if self.vae is None else int(2 ** (len(self.vae.config.block_out_channels) - 1))


@dataclass(frozen=True, slots=True)
class Text:
    """What prompts go through before the transformer sees them.

    Attributes:
        tokenizer: prompt to S token ids.
        encoder: transformers' T5EncoderModel, float32.
        projection: of what it writes to the transformer's width; a part of the transformer.
    """

    tokenizer: PromptTokenizer
    encoder: Any
    projection: nn.Module

    def graph(self, width: int, dtype: torch.dtype = torch.float32) -> TextEncoder:
        """Return the text encoder as a graph, from token ids (1, S) to embeddings (1, S, D)."""
        from hemiola_export.text_encoder import TextEncoder

        return TextEncoder(self.encoder, self.projection, self.tokenizer.num_tokens, width, dtype)


def load_model(source: str) -> Model:
    """Load a model from a diffusers folder or a hub id.

    Raises:
        ExportError: there is no such model, or no family opens it.
    """
    folder = _folder(source)
    index = _read_json(folder / "model_index.json", "a diffusers folder has one")
    class_name = _read_json(folder / "transformer" / "config.json", "the model has no transformer").get("_class_name")
    if class_name not in FAMILIES:
        raise ExportError(f"{source} holds a {class_name}; Hemiola opens {', '.join(FAMILIES)}")
    transformer = _whole(getattr(diffusers, class_name), folder / "transformer")
    text = _text(folder, index, transformer)
    settings = {} if text is None else {"num_text_tokens": text.tokenizer.num_tokens}
    family = open_transformer(transformer, **settings)
    if text is None and not family.num_classes:
        raise ExportError(
            f"{source} draws prompts, but has no text_encoder/. Take the folder of the whole pipeline, or copy "
            "text_encoder/ and tokenizer/ from the model that this one was trained from"
        )
    vae = None
    if (folder / "vae").is_dir():
        vae = _whole(diffusers.AutoencoderKL, folder / "vae").eval().requires_grad_(False)
    identity = ModelIdentity(
        family=family.key,
        name=folder.name if Path(source).is_dir() else source,
        weights_sha256=_weights_digest(folder / "transformer"),
        latent_shape=family.latent_shape,
    )
    scheduler = _scheduler_from_folder(folder / "scheduler")
    return Model(identity, transformer, family, scheduler, vae, _labels(index, family.num_classes), text)


def _whole(module: Any, folder: Path) -> Any:
    """Load a diffusers module in float32."""
    loaded, info = module.from_pretrained(
        folder, torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True
    )
    _check_whole(folder, info)
    return loaded


def _check_whole(folder: Path, info: dict[str, Any]) -> None:
    """Make sure that no weight is missing: the libraries would draw it at random, with no more than a warning."""
    if missing := sorted(info["missing_keys"]):
        raise ExportError(f"{folder} lacks {len(missing)} weights, as {missing[0]}. Fetch the model again")


def _text(folder: Path, index: dict[str, Any], transformer: Any) -> Text | None:
    """Open tokenizer and text encoder of a model that draws prompts."""
    if not (folder / "text_encoder").is_dir() or not hasattr(transformer, "caption_projection"):
        return None
    import transformers  # takes seconds, and models of labels do without

    from hemiola_export.tokenizer import read_tokenizer

    num_tokens = TEXT_TOKENS.get(str(index.get("_class_name")))
    tokenizer = read_tokenizer(folder / "tokenizer", num_tokens)
    transformers.utils.logging.disable_progress_bar()  # commands show their own
    encoder, info = transformers.T5EncoderModel.from_pretrained(
        folder / "text_encoder", dtype=torch.float32, output_loading_info=True
    )
    _check_whole(folder / "text_encoder", info)
    if tokenizer.num_ids > encoder.config.vocab_size:
        raise ExportError(
            f"the tokenizer has {tokenizer.num_ids} tokens, but the text encoder embeds {encoder.config.vocab_size}"
        )
    projection = transformer.caption_projection or nn.Identity()
    return Text(tokenizer, encoder.eval().requires_grad_(False), projection.eval().requires_grad_(False))


def _folder(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        return path.resolve()
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.model"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ExportError(
            f"{source} is neither a folder nor a model that the hub would give: {str(error).splitlines()[0]}"
        ) from error


def _read_json(path: Path, why: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror}; {why}") from error
    except ValueError as error:
        raise ExportError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ExportError(f"{path} holds no object")
    return data


def _weights_digest(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ExportError(f"{folder} holds no safetensors; save the model with diffusers' save_pretrained")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _labels(index: dict[str, Any], num_classes: int) -> dict[str, str]:
    known = index.get("id2label")
    known = known if isinstance(known, dict) else {}
    return {str(label): str(known.get(str(label), label)) for label in range(num_classes)}


def _scheduler_from_folder(folder: Path) -> Any:
    config = _read_json(folder / "scheduler_config.json", "a diffusers folder names its scheduler")
    class_name = str(config.get("_class_name"))
    if not class_name.endswith("Scheduler") or not hasattr(diffusers, class_name):
        raise ExportError(f"{folder} names the scheduler {class_name}, which diffusers {diffusers.__version__} lacks")
    return getattr(diffusers, class_name).from_config(config)


def make_scheduler(model: Model, name: str | None, options: dict[str, Any]) -> Any:
    """Make the scheduler a user asks for, on the noise levels that the model was trained with.

    Args:
        model: whose own scheduler serves where `name` is None, and whose configuration serves in any case.
        name: a key of SCHEDULERS or the name of a diffusers class.
        options: of the scheduler's configuration, as `use_karras_sigmas`.

    Raises:
        ExportError: there is no such scheduler or option.
    """
    preset: dict[str, Any] = {}
    if name is None:
        class_name = type(model.scheduler).__name__
    elif name in SCHEDULERS:
        class_name, preset = SCHEDULERS[name]
    else:
        class_name = name
    if not class_name.endswith("Scheduler") or not hasattr(diffusers, class_name):
        raise ExportError(f"unknown scheduler {name!r}; known are {', '.join(SCHEDULERS)} and diffusers' class names")
    scheduler_class = getattr(diffusers, class_name)
    try:
        known = sorted(key for key in scheduler_class().config if not key.startswith("_"))
        if unknown := sorted(set(options) - set(known)):
            raise ExportError(f"{class_name} has no option {', '.join(unknown)}; it has {', '.join(known)}")
        return scheduler_class.from_config(model.scheduler.config, **(preset | options))
    except ExportError:
        raise
    except Exception as error:  # a diffusers class raises whatever its arithmetic meets
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ExportError(f"{class_name} cannot be made with {preset | options or 'its defaults'}: {reason}") from error


def scheduler_from_identity(identity: SchedulerIdentity) -> Any:
    """Make the scheduler that a schedule was made for, and see that the installed diffusers still steps alike.

    Raises:
        ExportError: it does not.
    """
    if not hasattr(diffusers, identity.class_name):
        raise ExportError(f"diffusers {diffusers.__version__} has no {identity.class_name}")
    scheduler = getattr(diffusers, identity.class_name).from_config(config_from_identity(identity))
    if difference := identity.difference(scheduler_identity(scheduler, identity.num_inference_steps)):
        raise ExportError(
            f"the schedule was made for {identity.label}, which diffusers {diffusers.__version__} makes differently "
            f"({difference}). Search a schedule with this version"
        )
    return scheduler
