from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers.models.embeddings import PixArtAlphaTextProjection
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Model

from hemiola_engines.options import BuildOptions
from hemiola_engines.tensorrt import TENSORRT_RTX
from hemiola_export.architectures import draw_weights
from hemiola_export.errors import ExportError
from hemiola_export.onnx_graphs import export_graph
from hemiola_export.text_encoder import Product, TextEncoder
from hemiola_export.weight_file import WeightFile
from hemiola_runtime.graphs import WEIGHTS_FILE, GraphSpec
from hemiola_runtime.manifest import Profile

NUM_TOKENS: Final = 40  # farther apart than the 16 from which on T5 tells no distances apart
VOCABULARY: Final = 64
T5_WIDTH: Final = 32
WIDTH: Final = 24
LARGE: Final = 200.0  # a factor of the feed-forward's matrices that takes what they write beyond float16
DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Relative L2 of the embeddings. A half's rounding, 2⁻¹¹ and 2⁻⁸, once for each of the two factors of 10 products that
# follow each other, adds up to 4.5 of them; double that.
TOLERANCES: Final = {"fp16": 5e-3, "bf16": 4e-2}

Exported = tuple[GraphSpec, Path]


def t5(feed_forward: str = "gated-gelu", factor: float = 1.0, **changes: Any) -> Any:
    """Make a random T5 encoder of two blocks; `factor` multiplies the matrices of its feed-forwards."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=T5_WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj=feed_forward,
        **changes,
    )
    encoder: Any = T5EncoderModel(config).eval().requires_grad_(False)
    for block in encoder.encoder.block:
        block.layer[0].layer_norm.weight.uniform_(0.5, 1.5)
        for name, weight in block.layer[1].DenseReluDense.named_parameters():
            assert name.startswith("w")
            weight.mul_(factor)
    return encoder


def projection() -> nn.Module:
    return draw_weights(PixArtAlphaTextProjection(T5_WIDTH, WIDTH), seed=1)


def prompt(num_tokens: int = 13) -> tuple[Tensor, Tensor]:
    """Make the ids and mask of a prompt, (1, S) each."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(1, VOCABULARY, (1, NUM_TOKENS), generator=generator)
    mask = (torch.arange(NUM_TOKENS) < num_tokens).float()[None]
    return ids * mask.long(), mask


def reference(encoder: Any, project: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return what transformers and diffusers write: (1, S, D)."""
    with torch.inference_mode():
        written: Tensor = project(encoder(ids, attention_mask=mask.long())[0]).float()
    return written


def encoded(module: TextEncoder, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.inference_mode():
        written: Tensor = module({"token_ids": ids, "text_mask": mask})["text_embeddings"]
    return written


def difference(found: Tensor, expected: Tensor, mask: Tensor) -> float:
    """Return the relative L2 of what was written for tokens that are no padding."""
    kept = mask[0].bool()
    return float((found - expected)[0, kept].norm() / expected[0, kept].norm())


def export(module: TextEncoder, folder: Path) -> Exported:
    with (folder / WEIGHTS_FILE).open("wb") as file:
        graph = export_graph(
            module,
            name="text_encoder",
            rows_per_image=1,
            activation_bytes_per_row=0,
            folder=folder,
            weights=WeightFile(file),
        )
    return graph, folder / graph.file


def run(path: Path, ids: Tensor, mask: Tensor) -> Tensor:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (written,) = session.run(["text_embeddings"], {"token_ids": ids.numpy(), "text_mask": mask.numpy()})
    return torch.from_numpy(np.asarray(written))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Return the graph of the encoder with large activations in a precision, written when it is first asked for."""

    @functools.cache
    def get(precision: str) -> Exported:
        module = TextEncoder(t5(factor=LARGE), projection(), NUM_TOKENS, WIDTH, DTYPES[precision])
        return export(module, tmp_path_factory.mktemp(precision))

    return get


@pytest.mark.parametrize("num_tokens", [1, 13, NUM_TOKENS])
def test_the_graph_in_float32_writes_what_transformers_does(
    exported: Callable[[str], Exported], num_tokens: int
) -> None:
    ids, mask = prompt(num_tokens)
    written = run(exported("fp32")[1], ids, mask)
    assert written.dtype == torch.float32
    assert written.isfinite().all()
    assert difference(written, reference(t5(factor=LARGE), projection(), ids, mask), mask) < 1e-5


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu", "gated-silu", "gelu"])
def test_every_feed_forward_is_that_of_transformers(feed_forward: str) -> None:
    encoder, project = t5(feed_forward), projection()
    ids, mask = prompt()
    module = TextEncoder(encoder, project, NUM_TOKENS, WIDTH)
    assert difference(encoded(module, ids, mask), reference(encoder, project, ids, mask), mask) < 1e-5


@pytest.mark.parametrize("factor", [1.0, LARGE, 100 * LARGE])
@pytest.mark.parametrize("precision", TOLERANCES)
def test_half_precision_stays_close_however_large_the_activations(precision: str, factor: float) -> None:
    encoder, project = t5(factor=factor), projection()
    ids, mask = prompt()
    written = encoded(TextEncoder(encoder, project, NUM_TOKENS, WIDTH, DTYPES[precision]), ids, mask)
    assert written.dtype == torch.float32
    assert written.isfinite().all()
    assert difference(written, reference(encoder, project, ids, mask), mask) < TOLERANCES[precision]


def test_matrices_of_large_numbers_overflow_no_sum() -> None:
    layer = nn.Linear(1000, 1, bias=False)
    layer.weight.data[:] = 6e4
    x = torch.full((1, 1000), 1e3)
    assert Product(layer, torch.float16)(x).item() == pytest.approx(6e10, rel=1e-3)


def test_the_same_activations_are_too_large_for_t5_in_float16_itself() -> None:
    ids, mask = prompt()
    encoder, project = t5(factor=LARGE), projection()
    halves = copy.deepcopy(encoder).half(), copy.deepcopy(project).half()
    naive = difference(reference(*halves, ids, mask), reference(encoder, project, ids, mask), mask)
    assert not naive < 0.1  # NaN is not either


def test_the_graph_in_float16_stays_close(exported: Callable[[str], Exported]) -> None:
    ids, mask = prompt()
    written = run(exported("fp16")[1], ids, mask)
    assert difference(written, reference(t5(factor=LARGE), projection(), ids, mask), mask) < TOLERANCES["fp16"]


@pytest.mark.parametrize("precision", DTYPES)
def test_padding_changes_nothing_and_is_finite(precision: str) -> None:
    module = TextEncoder(t5(), projection(), NUM_TOKENS, WIDTH, DTYPES[precision])
    ids, mask = prompt()
    other = torch.where(mask.bool(), ids, VOCABULARY - 1 - ids)
    assert torch.equal(encoded(module, ids, mask)[:, :13], encoded(module, other, mask)[:, :13])
    assert encoded(module, ids, torch.zeros_like(mask)).isfinite().all()


@pytest.mark.parametrize("precision", DTYPES)
def test_the_modules_given_are_left_as_they_are(precision: str) -> None:
    encoder, project = t5().train(), projection().train()
    before = copy.deepcopy((encoder.state_dict(), project.state_dict()))
    module = TextEncoder(encoder, project, NUM_TOKENS, WIDTH, DTYPES[precision]).eval()
    assert not any(part.training for part in module.modules())
    for given, weights in zip((encoder, project), before, strict=True):
        assert all(part.training for part in given.modules())
        assert given.state_dict().keys() == weights.keys()
        for name, weight in given.state_dict().items():
            assert weight.dtype == torch.float32
            assert torch.equal(weight, weights[name])


@pytest.mark.parametrize("precision", DTYPES)
def test_weights_of_products_have_the_compute_dtype_and_all_else_float32(precision: str) -> None:
    encoder = t5()
    module = TextEncoder(encoder, projection(), NUM_TOKENS, WIDTH, DTYPES[precision])
    dtypes = {name: weight.dtype for name, weight in module.named_parameters()}
    halves = {name for name in dtypes if name == "embedding" or name.endswith(".weight")}
    assert len(halves) == 1 + 2 * 7 + 2  # embedding, seven matrices a block, two of the projection
    assert {dtypes[name] for name in halves} == {DTYPES[precision]}
    assert {dtypes[name] for name in dtypes.keys() - halves} == {torch.float32}
    if precision == "fp32":  # and none of the encoder's takes memory twice
        assert module.embedding.data_ptr() == encoder.shared.weight.data_ptr()


def test_a_model_without_projection_gives_what_t5_writes() -> None:
    encoder = t5()
    ids, mask = prompt()
    module = TextEncoder(encoder, nn.Identity(), NUM_TOKENS, T5_WIDTH)
    assert difference(encoded(module, ids, mask), reference(encoder, nn.Identity(), ids, mask), mask) < 1e-5


@pytest.mark.parametrize("precision", DTYPES)
def test_position_bias_is_a_constant_of_the_graph(exported: Callable[[str], Exported], precision: str) -> None:
    graph, path = exported(precision)
    onnx.checker.check_model(path)
    (bias,) = [weight for weight in graph.weights if weight.shape == (1, 4, NUM_TOKENS, NUM_TOKENS)]
    assert bias.dtype == "float32"
    nodes = onnx.load(path, load_external_data=False).graph.node
    assert not {"Log", "Range", "Where", "Trilu", "IsNaN"} & {node.op_type for node in nodes}
    assert sum(node.op_type == "Gather" for node in nodes) == 1  # of the embeddings
    assert sum(bias.name in node.input for node in nodes) == 1  # padding is added to it once, not in every block


@pytest.mark.parametrize("precision", DTYPES)
def test_every_graph_builds_with_tensorrt_rtx_without_a_warning(
    exported: Callable[[str], Exported], precision: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph, path = exported(precision)
    target = tmp_path / "text_encoder.engine"
    options = BuildOptions(backend="tensorrt_rtx", max_batch_size=1)
    TENSORRT_RTX.build_engine(
        graph, path, target, (Profile({"B": (1, 1, 1)}),), options, lambda _: None, rows_per_image=1
    )
    assert target.stat().st_size > 0
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []


def test_an_encoder_that_is_no_t5_is_refused() -> None:
    model: Any = T5Model(t5().config)
    with pytest.raises(ExportError, match="is a T5Model; Hemiola opens transformers' T5EncoderModel"):
        TextEncoder(model, projection(), NUM_TOKENS, WIDTH)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ExportError, match=r"dense_act_fn = 'tanh' is not supported; relu, .*gelu_new.* are"):
        TextEncoder(t5("tanh"), projection(), NUM_TOKENS, WIDTH)


def test_a_projection_of_another_width_is_refused() -> None:
    with pytest.raises(ExportError, match="write 24 channels where 32 are read"):
        TextEncoder(t5(), projection(), NUM_TOKENS, 32)


def test_a_weight_that_float16_does_not_hold_is_refused_and_bfloat16_takes_it() -> None:
    encoder = t5()
    encoder.encoder.block[0].layer[0].SelfAttention.o.weight[0, 0] = -70000.0
    with pytest.raises(ExportError, match=r"is 70000, which is no number of float16\. Export it in bf16"):
        TextEncoder(encoder, projection(), NUM_TOKENS, WIDTH, torch.float16)
    assert encoded(TextEncoder(encoder, projection(), NUM_TOKENS, WIDTH, torch.bfloat16), *prompt()).isfinite().all()
