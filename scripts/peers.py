"""What else a user of diffusers would pick: diffusers' own transformer and scheduler, with the caches that fit them."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from diffusers import hooks
from diffusers.models.cache_utils import CacheMixin
from numpy.typing import NDArray
from torch import Tensor

from hemiola_export.model import Model
from hemiola_runtime.noise import noise_from_seeds

CACHED_MODULES: Final = [r"transformer_blocks\.\d+\.attn1", r"transformer_blocks\.\d+\.ff"]  # of diffusers' TaylorSeer
WARMUP_STEPS: Final = 4  # of cache-dit: computed at the beginning

Latents = NDArray[np.float32]
Do = Callable[[Any, int], None]  # something with a transformer, for a number of steps


def _nothing(transformer: Any, num_steps: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to run diffusers' transformer.

    Attributes:
        who: the library.
        how: its method and settings.
        install: puts its caches in.
        begin: has them forget the request before.
        num_steps: T; None for that of the bundle.
    """

    who: str
    how: str
    install: Do = _nothing
    begin: Do = _nothing
    num_steps: int | None = None


class Loop:
    """Draws final latents with diffusers' transformer and scheduler; both rows of a guided image in one call."""

    def __init__(
        self, model: Model, scheduler: Any, peer: Peer, *, num_steps: int, guidance_scale: float, dtype: torch.dtype
    ) -> None:
        """Set up, on a GPU where PyTorch has one."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.transformer = copy.deepcopy(model.transformer).to(self.device, dtype).eval()
        self._scheduler, self._scale, self._dtype = scheduler, guidance_scale, dtype
        self._num_steps = peer.num_steps or num_steps
        self._num_classes, self._shape = model.family.num_classes, model.family.latent_shape
        peer.install(self.transformer, self._num_steps)
        self._begin = partial(peer.begin, self.transformer, self._num_steps)
        self._has_hooks = any(hasattr(module, "_diffusers_hook") for module in self.transformer.modules())

    @torch.inference_mode()
    def draw(self, seeds: Sequence[int], labels: Sequence[int]) -> Latents:
        """Draw the final latents (B, C, H, W)."""
        self._begin()
        self._scheduler.set_timesteps(self._num_steps, device=self.device)
        noise = torch.from_numpy(noise_from_seeds(seeds, self._shape)).to(self.device)
        latents = noise * self._scheduler.init_noise_sigma
        wanted = torch.tensor(labels, device=self.device)
        rows = torch.cat([wanted, torch.full_like(wanted, self._num_classes)])
        for t in self._scheduler.timesteps:
            scaled = self._scheduler.scale_model_input(torch.cat([latents, latents]), t).to(self._dtype)
            with CacheMixin.cache_context(self.transformer, "cond") if self._has_hooks else nullcontext():
                output = self.transformer(scaled, timestep=t.expand(len(rows)), class_labels=rows).sample
            cond, uncond = output[:, : self._shape[0]].float().chunk(2)
            latents = self._scheduler.step(uncond + self._scale * (cond - uncond), t, latents).prev_sample
        drawn: Latents = latents.cpu().numpy()
        return drawn


def diffusers_peers(ratios: Tensor) -> Iterator[Peer]:
    """Return diffusers' cache hooks at several settings.

    Args:
        ratios: (T,) of MagCache, see `magnitude_ratios`.
    """
    for threshold in (0.025, 0.05, 0.1):
        first = hooks.FirstBlockCacheConfig(threshold=threshold)
        yield _hooked(f"FirstBlockCache, threshold {threshold:g}", hooks.apply_first_block_cache, first)
    for threshold, most in ((0.06, 3), (0.12, 3), (0.24, 5)):
        magnitude = hooks.MagCacheConfig(
            threshold=threshold, max_skip_steps=most, num_inference_steps=len(ratios), mag_ratios=ratios
        )
        yield _hooked(f"MagCache, threshold {threshold:g}, at most {most} steps", hooks.apply_mag_cache, magnitude)
    for interval in (3, 5):
        taylor = hooks.TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=2,
            max_order=1,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=CACHED_MODULES,
        )
        yield _hooked(f"TaylorSeer, interval {interval}, order 1", hooks.apply_taylorseer_cache, taylor)


def _hooked(how: str, apply: Callable[[Any, Any], None], config: Any) -> Peer:
    def install(transformer: Any, num_steps: int) -> None:
        apply(transformer, config)

    def begin(transformer: Any, num_steps: int) -> None:
        CacheMixin._reset_stateful_cache(transformer)

    return Peer("diffusers", how, install, begin)


def cache_dit_peers() -> Iterator[Peer]:
    """Return cache-dit's DBCache, without and with TaylorSeer, at several settings; none where it is not installed."""
    if importlib.util.find_spec("cache_dit") is None:
        return
    for order in (0, 1):
        for threshold in (0.04, 0.08, 0.16):
            how = f"DBCache F1B0, threshold {threshold:g}" + (f", TaylorSeer order {order}" if order else "")
            yield Peer("cache-dit", how, partial(_install_cache_dit, threshold, order), _refresh_cache_dit)


def _install_cache_dit(threshold: float, order: int, transformer: Any, num_steps: int) -> None:
    import cache_dit
    from cache_dit.caching.patch_functors import DiTPatchFunctor

    adapter = cache_dit.BlockAdapter(
        transformer=transformer,
        blocks=transformer.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        patch_functor=DiTPatchFunctor(),
        has_separate_cfg=False,
    )
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=threshold,
        max_warmup_steps=WARMUP_STEPS,
        num_inference_steps=num_steps,
    )
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)


def _refresh_cache_dit(transformer: Any, num_steps: int) -> None:
    import cache_dit

    cache_dit.refresh_context(transformer, num_inference_steps=num_steps, verbose=False)


def magnitude_ratios(loop: Loop, seeds: Sequence[int], labels: Sequence[int]) -> Tensor:
    """Measure MagCache's ratios of one uncached request, (T,): of the norms of what all blocks add, step by step."""
    begun: list[Tensor] = []
    norms: list[Tensor] = []

    def before(block: Any, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        begun.append(given[0] if given else named["hidden_states"])

    def after(block: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
        norms.append((output - begun.pop()).float().norm(dim=-1).flatten())

    blocks = loop.transformer.transformer_blocks
    handles = [
        blocks[0].register_forward_pre_hook(before, with_kwargs=True),
        blocks[-1].register_forward_hook(after),
    ]
    loop.draw(seeds, labels)
    for handle in handles:
        handle.remove()
    return torch.tensor([1.0, *(float((new / old).mean()) for old, new in pairwise(norms))])
