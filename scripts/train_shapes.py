"""Train the text-to-image example: a PixArt-α transformer that draws coloured shapes as a caption asks for.

    python scripts/train_shapes.py --out examples/shapes

The grammar is small: "a green triangle", "a red circle left of a blue square". Pictures are rendered as training goes
on, so that none is seen twice. Writes a diffusers folder (`model_index.json`, `tokenizer/`, `text_encoder/`,
`transformer/`, `scheduler/`), a judge of its samples (`judge/`: a reader of scenes as an ONNX graph, the statistics of
its features on renders, and the scene of every caption) and `training.json`, the record of how good the result is.

Three trainings, each on its own: the judge on renders; the text encoder on naming what a caption says; the
transformer on the frozen encoder's embeddings, which are computed once. On two cores with bfloat16 units 0.4 seconds an
iteration of the transformer when idle, and 5 minutes for all the rest.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from diffusers import __version__ as diffusers_version
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
from transformers import __version__ as transformers_version

from hemiola_search.judge import Judge as SavedJudge
from judge_graph import save_judge
from shapes import (
    HEADS,
    SAMPLE_SIZE,
    SHARE_OF_SINGLES,
    agreement,
    as_pictures,
    attribute_table,
    draw_scenes,
    held_out_scenes,
    log_probabilities,
    render,
    rule_agreement,
    scene_of_captions,
    scenes,
)

NUM_FEATURES: Final = 48
CAPTION_CHANNELS: Final = 128
MAX_TOKENS: Final = 16  # the longest caption has 10, its end included
CAPTION_DROPOUT: Final = 0.1  # as in PixArt-α (Chen et al. 2023, arXiv:2310.00426)
EMA_DECAY: Final = 0.998


class Judge(nn.Module):
    """A small reader of scenes; the layer before its heads is the feature space of the Fréchet distance."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, NUM_FEATURES),
        )
        self.heads = nn.Linear(NUM_FEATURES, sum(HEADS))
        self.register_buffer("table", attribute_table())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (B, 32, 32, 3) in [0, 1] to log-probabilities of the scenes (B, C) and features (B, 48)."""
        features = self.features(images.permute(0, 3, 1, 2) * 2 - 1)
        return log_probabilities(self.heads(F.gelu(features))) @ self.table.T, features


def train_judge(num_iterations: int, seed: int) -> Judge:
    """Train the judge on renders with a little noise."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_iterations)
    for _ in tqdm(range(num_iterations), desc="judge", disable=None):
        pictures, chosen = draw_scenes(128, generator)
        strength = 0.08 * torch.rand((len(pictures), 1, 1, 1), generator=generator)
        pictures = (pictures + strength * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)
        loss = F.nll_loss(judge(pictures)[0], chosen)  # the heads make a scene's logit a log-probability
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return judge.eval().requires_grad_(False)


def read_by_judge(folder: Path, pictures: Tensor) -> Tensor:
    """Return the scenes (B,) that the judge of a folder reads off pictures (B, 32, 32, 3)."""
    judge = SavedJudge(folder / "judge")
    return torch.cat([torch.from_numpy(judge.look(part.numpy())[0]) for part in pictures.split(500)])


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows the words of the grammar; `</s>` ends every prompt, the empty one too."""
    words = sorted({word for caption in scene_of_captions() for word in caption.split()})
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


def tokens_of(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return ids and mask, both (B, 16), as PixArtAlphaPipeline makes them of prompts."""
    cleaned = [prompt.lower().strip() for prompt in prompts]
    tokens = tokenizer(cleaned, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def train_text_encoder(
    tokenizer: PreTrainedTokenizerFast, captions: Sequence[str], num_iterations: int, seed: int
) -> T5EncoderModel:
    """Train the encoder so that a linear head names the whole scene of a caption at each of its tokens.

    The empty prompt says nothing: there, every value of a head stays as likely as the next.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=CAPTION_CHANNELS,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    encoder = T5EncoderModel(config)
    # T5 starts with a bias near zero, blind to the order of words: this encoder then learns its captions by heart.
    bias = encoder.get_parameter("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    nn.init.normal_(bias, std=2.0)
    heads = nn.Linear(CAPTION_CHANNELS, sum(HEADS))
    scene_of = scene_of_captions()
    nothing = torch.cat([torch.full((size,), 1 / size) for size in HEADS])
    targets = torch.cat([attribute_table()[[scene_of[caption] for caption in captions]], nothing[None]])  # (N + 1, H)
    ids, mask = tokens_of(tokenizer, [*captions, ""])
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=2e-3, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_iterations)
    progress = tqdm(range(num_iterations), desc="text encoder", disable=None)
    for _ in progress:
        chosen = torch.randint(0, len(ids), (128,), generator=generator)
        chosen[0] = len(captions)
        hidden = encoder(input_ids=ids[chosen], attention_mask=mask[chosen]).last_hidden_state  # (B, 16, 128)
        losses = -(log_probabilities(heads(hidden)) * targets[chosen][:, None]).sum(-1)  # (B, 16)
        loss = losses[mask[chosen] == 1].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        rate.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")
    encoder.eval().requires_grad_(False)
    return encoder


@torch.inference_mode()
def embed(
    tokenizer: PreTrainedTokenizerFast, text_encoder: T5EncoderModel, prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return the embeddings (B, 16, 128) of prompts and their masks (B, 16)."""
    ids, mask = tokens_of(tokenizer, prompts)
    hidden: Tensor = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return hidden, mask


def new_model() -> PixArtTransformer2DModel:
    """Make the transformer; its gates, cross-attention and head start at zero: every block is the identity."""
    model = PixArtTransformer2DModel(
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        num_layers=12,
        cross_attention_dim=160,
        sample_size=SAMPLE_SIZE,
        patch_size=4,
        caption_channels=CAPTION_CHANNELS,
        use_additional_conditions=False,
    )
    nn.init.normal_(model.adaln_single.linear.weight, std=0.02)
    nn.init.zeros_(model.adaln_single.linear.bias)
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.scale_shift_table.zero_()
            block.attn2.to_out[0].weight.zero_()
            block.attn2.to_out[0].bias.zero_()
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


def train(
    scheduler: DPMSolverMultistepScheduler,
    text: tuple[Tensor, Tensor],
    attributes: Tensor,
    *,
    num_iterations: int,
    batch_size: int,
    seed: int,
    use_compile: bool,
    folder: Path,
    start: PixArtTransformer2DModel | None = None,
) -> PixArtTransformer2DModel:
    """Train on v-prediction with AdamW, a cosine learning rate and matrix products in bfloat16.

    Args:
        scheduler: its alphas_cumprod (T,) make the noise.
        text: embeddings (N + 1, 16, 128) and masks (N + 1, 16) of the captions; those of the empty prompt are last.
        attributes: (N, 5), the scenes of the captions.
        num_iterations: steps of the optimizer.
        batch_size: pictures a step.
        seed: of weights, captions, pictures and noise.
        use_compile: compile the transformer, which takes a minute and saves a fifth of the time.
        folder: gets the state of the EMA weights every 500 iterations.
        start: what to go on from, at a lower learning rate; None for a new model.

    Returns:
        The EMA weights, in float32.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    embeddings, masks = text
    num_singles = int((attributes[:, 0] == 0).sum())
    assert (attributes[:num_singles, 0] == 0).all()
    model = new_model() if start is None else start
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    # The backward pass of fused attention in bfloat16 takes half of the time of an iteration on a CPU (torch 2.13).
    model.set_attn_processor(AttnProcessor())
    forward = torch.compile(model, dynamic=False) if use_compile else model
    peak = 1e-3 if start is None else 6e-4
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    warmup = min(200, num_iterations // 10 + 1)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / warmup) * 0.5 * (1 + float(np.cos(np.pi * i / num_iterations))) + 1e-3,
    )
    progress = tqdm(range(num_iterations), desc="train", disable=None)
    for iteration in progress:
        single = torch.randint(0, num_singles, (batch_size,), generator=generator)
        pair = torch.randint(num_singles, len(attributes), (batch_size,), generator=generator)
        chosen = torch.where(torch.rand(batch_size, generator=generator) < SHARE_OF_SINGLES, single, pair)
        dropped = torch.rand(batch_size, generator=generator) < CAPTION_DROPOUT
        caption = torch.where(dropped, len(attributes), chosen)
        clean = render(attributes[chosen], generator)
        noise = torch.randn(clean.shape, generator=generator)
        timestep = torch.randint(0, scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
        alpha = scheduler.alphas_cumprod[timestep].sqrt()[:, None, None, None]
        sigma = (1 - alpha.square()).sqrt()
        with torch.autocast("cpu", torch.bfloat16):
            predicted = forward(
                alpha * clean + sigma * noise,
                encoder_hidden_states=embeddings[caption],
                encoder_attention_mask=masks[caption],
                timestep=timestep,
                return_dict=False,
            )[0]
        loss = F.mse_loss(predicted.float(), alpha * noise - sigma * clean)  # v (Salimans & Ho 2022, arXiv:2202.00512)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        decay = min(EMA_DECAY, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            torch._foreach_lerp_([*ema.parameters()], [*model.parameters()], 1 - decay)
        if iteration % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if iteration % 500 == 499:
            copy.deepcopy(ema).half().save_pretrained(folder)
    return ema


@torch.inference_mode()
def sample(
    model: PixArtTransformer2DModel,
    scheduler: DPMSolverMultistepScheduler,
    text: tuple[Tensor, Tensor],
    nothing: tuple[Tensor, Tensor],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
) -> Tensor:
    """Draw one picture per prompt with classifier-free guidance: (B, 3, 32, 32), nominally in [-1, 1].

    `text` holds embeddings (B, 16, 128) and masks (B, 16) of the prompts, `nothing` those of the empty one, (1, …).
    """
    generator = torch.Generator().manual_seed(seed)
    num = len(text[0])
    x = torch.randn((num, 3, SAMPLE_SIZE, SAMPLE_SIZE), generator=generator)
    embeddings, masks = (torch.cat([each, empty.expand_as(each)]) for each, empty in zip(text, nothing, strict=True))
    scheduler.set_timesteps(num_inference_steps)
    for t in scheduler.timesteps:
        cond, uncond = model(
            torch.cat([x, x]),
            encoder_hidden_states=embeddings,
            encoder_attention_mask=masks,
            timestep=t.expand(2 * num),
            return_dict=False,
        )[0].chunk(2)
        x = scheduler.step(uncond + guidance_scale * (cond - uncond), t, x, return_dict=False)[0]
    return x


def main() -> None:
    """Train the three, save them, draw prompts of the grammar and record what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("examples/shapes"))
    parser.add_argument("--start", type=Path, help="go on from the folder of an earlier run, at a lower learning rate")
    parser.add_argument("--iterations", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--judge-iterations", type=int, default=1500)
    parser.add_argument("--text-iterations", type=int, default=300)
    parser.add_argument("--renders", type=int, default=10_000, help="for the judge's accuracy, and for its statistics")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    parser.add_argument("--record-samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of the record")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="guidance of the record")
    options = parser.parse_args()
    start = time.perf_counter()

    earlier: list[dict[str, float]] = []
    if options.start is None:
        judge = train_judge(options.judge_iterations, options.seed)
        renders, _ = draw_scenes(options.renders, torch.Generator().manual_seed(options.seed + 2))
        save_judge(judge, renders, options.out / "judge")
        (options.out / "judge" / "prompts.json").write_text(json.dumps(scene_of_captions(), indent=1) + "\n")
    else:
        if options.start.resolve() != options.out.resolve():
            shutil.copytree(options.start, options.out, dirs_exist_ok=True)
        record = options.start / "training.json"  # which a run that was stopped has not written
        earlier = json.loads(record.read_text())["stages"] if record.exists() else []
    renders, shown = draw_scenes(options.renders, torch.Generator().manual_seed(options.seed + 1))
    judge_accuracy = (read_by_judge(options.out, renders) == shown).float().mean().item()

    scene_of = scene_of_captions()
    held_out = held_out_scenes(options.seed)
    captions = [caption for caption, scene in scene_of.items() if scene not in held_out]
    tokenizer = new_tokenizer()
    begun = None
    if options.start is None:
        tokenizer.save_pretrained(options.out / "tokenizer")
        text_encoder = train_text_encoder(tokenizer, captions, options.text_iterations, options.seed)
        text_encoder.half().save_pretrained(options.out / "text_encoder")
    else:
        begun = new_model()
        begun.load_state_dict(load_file(options.start / "transformer" / "diffusion_pytorch_model.safetensors"))
    # What the transformer learns to read is what was stored: fp16 weights.
    text_encoder = T5EncoderModel.from_pretrained(options.out / "text_encoder", dtype=torch.float32)
    text_encoder = text_encoder.eval().requires_grad_(False)

    scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction")
    scheduler.save_pretrained(options.out / "scheduler")
    index = {
        "_class_name": "PixArtAlphaPipeline",
        "_diffusers_version": diffusers_version,
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": [None, None],
    }
    (options.out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    attributes = torch.tensor([scene.attributes() for scene in scenes()])
    model = train(
        scheduler,
        embed(tokenizer, text_encoder, [*captions, ""]),
        attributes[[scene_of[caption] for caption in captions]],
        num_iterations=options.iterations,
        batch_size=options.batch_size,
        seed=options.seed,
        use_compile=options.compile,
        folder=options.out / "transformer",
        start=begun,
    )
    model.half().save_pretrained(options.out / "transformer")
    minutes = round((time.perf_counter() - start) / 60, 1)

    model = model.float()  # what is judged is what was stored: fp16 weights
    seed = options.seed + 1

    def draw(prompts: Sequence[str], seed: int) -> tuple[Tensor, Tensor]:
        """Return pictures (n, 32, 32, 3) of prompts, and the scenes (n,) that these ask for."""
        settings = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
        nothing = embed(tokenizer, text_encoder, [""])
        drawn = []
        for i in tqdm(range(0, len(prompts), 100), desc="sample", disable=None):
            text = embed(tokenizer, text_encoder, prompts[i : i + 100])
            drawn.append(sample(model, scheduler, text, nothing, seed=seed * 1000 + i, **settings))
        return as_pictures(torch.cat(drawn)), torch.tensor([scene_of[prompt] for prompt in prompts])

    every = [*scene_of]
    shuffled = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    prompts = [every[shuffled[i % len(every)]] for i in range(options.record_samples)]
    unseen = [caption for caption, scene in scene_of.items() if scene in held_out]
    pictures, asked = draw(prompts, seed)
    unseen_pictures, unseen_asked = draw(
        [unseen[i % len(unseen)] for i in range(options.record_samples // 2)], seed + 1
    )
    record = {
        "samples": len(pictures),
        "sampler": f"DPM-Solver++ 2M, {options.steps} steps, guidance {options.guidance_scale:g}",
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "seed": seed,
        "judge_agreement": agreement(read_by_judge(options.out, pictures), asked),
        "rule_agreement": rule_agreement(pictures, asked),
        "held_out_captions": len(unseen),
        "held_out_samples": len(unseen_pictures),
        "judge_agreement_on_held_out_captions": agreement(read_by_judge(options.out, unseen_pictures), unseen_asked),
        "rule_agreement_on_held_out_captions": rule_agreement(unseen_pictures, unseen_asked),
        "judge_accuracy_on_renders": round(judge_accuracy, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "text_encoder_parameters": sum(p.numel() for p in text_encoder.parameters()),
        "stages": [*earlier, {"iterations": options.iterations, "planned": options.iterations, "minutes": minutes}],
        "batch_size": options.batch_size,
        "training_seed": options.seed,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers_version,
            "transformers": transformers_version,
        },
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
