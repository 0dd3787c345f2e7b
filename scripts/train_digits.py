"""Train the example model: a class-conditional DiT on scikit-learn's 1,797 scans of handwritten digits.

    python scripts/train_digits.py --out examples/digits

Writes a diffusers folder (`model_index.json`, `transformer/`, `scheduler/`), a judge of its samples (`judge/`: a
classifier as an ONNX graph and the statistics of its features on the real scans) and `training.json`, the record of
how good the result is. On two idle cores about 25 minutes of training and 5 of sampling for the record.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers import __version__ as diffusers_version
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor, nn
from tqdm import tqdm

from judge_graph import save_judge

NUM_CLASSES: Final = 10
NULL_LABEL: Final = NUM_CLASSES  # the label that stands for "no label" under classifier-free guidance
SAMPLE_SIZE: Final = 16
LABEL_DROPOUT: Final = 0.1  # as in DiT (Peebles & Xie 2022, arXiv:2212.09748)
EMA_DECAY: Final = 0.998


class Judge(nn.Module):
    """A small classifier of digits; the layer before its logits is the feature space of the Fréchet distance."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 32),
        )
        self.classify = nn.Linear(32, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (B, 16, 16, 1) in [0, 1] to logits (B, 10) and features (B, 32)."""
        features = self.features(images.permute(0, 3, 1, 2) * 2 - 1)
        return self.classify(F.gelu(features)), features


def real_scans() -> tuple[Tensor, Tensor]:
    """Load the scans, enlarged from 8×8: images (1797, 1, 16, 16) in [-1, 1] and labels (1797,)."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=SAMPLE_SIZE, mode="bilinear", align_corners=False)
    return images, torch.tensor(digits.target)


def shifted(images: Tensor, generator: torch.Generator, limit: int = 1) -> Tensor:
    """Move each image by up to `limit` pixels in both directions; the paper's white stays white."""
    padded = F.pad(images, (limit,) * 4, value=-1.0)
    offsets = torch.randint(0, 2 * limit + 1, (len(images), 2), generator=generator)
    return torch.stack(
        [
            image[:, y : y + SAMPLE_SIZE, x : x + SAMPLE_SIZE]
            for image, (y, x) in zip(padded, offsets.tolist(), strict=True)
        ]
    )


def new_model() -> DiTTransformer2DModel:
    """Make the transformer with adaLN-Zero initialisation: every block starts as the identity."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=12,
        sample_size=SAMPLE_SIZE,
        patch_size=2,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        # diffusers drops labels in every block on its own; guidance needs one decision for the whole image.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def train(scheduler: DDIMScheduler, num_iterations: int, batch_size: int, seed: int) -> DiTTransformer2DModel:
    """Train on epsilon prediction with AdamW and a cosine learning rate; returns the EMA weights."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    images, labels = real_scans()
    model = new_model()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    warmup = max(1, min(200, num_iterations // 10))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / warmup) * 0.5 * (1 + float(np.cos(np.pi * i / num_iterations))) + 1e-3,
    )
    progress = tqdm(range(num_iterations), desc="train", disable=None)
    for iteration in progress:
        chosen = torch.randint(0, len(images), (batch_size,), generator=generator)
        clean = images[chosen]
        dropped = torch.rand(batch_size, generator=generator) < LABEL_DROPOUT
        label = torch.where(dropped, NULL_LABEL, labels[chosen])
        noise = torch.randn(clean.shape, generator=generator)
        timestep = torch.randint(0, scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
        noisy = scheduler.add_noise(clean, noise, timestep)
        loss = F.mse_loss(model(noisy, timestep, label).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        decay = min(EMA_DECAY, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)
        if iteration % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    return ema


@torch.inference_mode()
def sample(
    model: DiTTransformer2DModel,
    scheduler: DDIMScheduler,
    labels: Tensor,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
) -> Tensor:
    """Draw one image per label with classifier-free guidance: (B, 1, 16, 16), nominally in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((len(labels), 1, SAMPLE_SIZE, SAMPLE_SIZE), generator=generator)
    both = torch.cat([labels, torch.full_like(labels, NULL_LABEL)])
    scheduler.set_timesteps(num_inference_steps)
    for t in scheduler.timesteps:
        cond, uncond = model(torch.cat([x, x]), t.expand(len(both)), both).sample.chunk(2)
        x = scheduler.step(uncond + guidance_scale * (cond - uncond), t, x).prev_sample
    return x


def as_pictures(samples: Tensor) -> Tensor:
    """Turn samples (B, 1, H, W) in [-1, 1] into pictures (B, H, W, 1) in [0, 1]."""
    return (samples / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def train_judge(seed: int, num_epochs: int = 60) -> tuple[Judge, float]:
    """Train the judge on four fifths of the scans; returns it with its accuracy on the last fifth."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = real_scans()
    fit, held_out = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=seed, stratify=labels)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs)
    for _ in tqdm(range(num_epochs), desc="judge", disable=None):
        for batch in torch.tensor(fit)[torch.randperm(len(fit), generator=generator)].split(64):
            pictures = as_pictures(shifted(images[batch], generator))
            loss = F.cross_entropy(judge(pictures)[0], labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rate.step()
    judge.eval().requires_grad_(False)
    right = judge(as_pictures(images[held_out]))[0].argmax(1) == labels[held_out]
    return judge, right.float().mean().item()


def svm_agreement(samples: Tensor, labels: Tensor) -> float:
    """The share of samples that an SVM fitted on all real scans reads as their label: a second opinion."""
    images, targets = real_scans()
    svm = SVC(gamma="scale", C=10.0).fit(images.flatten(1).numpy(), targets.numpy())
    read: NDArray[np.int64] = svm.predict(samples.clamp(-1, 1).flatten(1).numpy())
    return float((read == labels.numpy()).mean())


def main() -> None:
    """Train, save, sample 1,000 digits and record what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("examples/digits"))
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record-samples", type=int, default=1000)
    options = parser.parse_args()

    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    start = time.perf_counter()
    model = train(scheduler, options.iterations, options.batch_size, options.seed)
    training_minutes = (time.perf_counter() - start) / 60

    model.half().save_pretrained(options.out / "transformer")
    scheduler.save_pretrained(options.out / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers_version,
        "id2label": {str(digit): str(digit) for digit in range(NUM_CLASSES)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": [None, None],
    }
    (options.out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    judge, judge_accuracy = train_judge(options.seed)
    save_judge(judge, as_pictures(real_scans()[0]), options.out / "judge")

    model = model.float()  # what is judged is what was stored: fp16 weights
    labels = torch.arange(options.record_samples) % NUM_CLASSES
    seed = options.seed + 1
    drawn = []
    for i, part in enumerate(tqdm(labels.split(100), desc="sample", disable=None)):
        settings = {"num_inference_steps": 50, "guidance_scale": 2.0, "seed": seed * 1000 + i}
        drawn.append(sample(model, scheduler, part, **settings))
    samples = torch.cat(drawn)
    judged = (judge(as_pictures(samples))[0].argmax(1) == labels).float().mean().item()
    record = {
        "samples": len(samples),
        "sampler": "DDIM-50, guidance 2",
        "seed": seed,
        "judge_agreement": round(judged, 4),
        "svm_agreement": round(svm_agreement(samples, labels), 4),
        "judge_accuracy_on_held_out_scans": round(judge_accuracy, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "iterations": options.iterations,
        "batch_size": options.batch_size,
        "training_seed": options.seed,
        "training_minutes": round(training_minutes, 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers_version,
        },
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
