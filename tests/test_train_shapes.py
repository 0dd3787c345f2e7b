"""`scripts/train_shapes.py`, and the folder that it has written: examples/shapes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import diffusers
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from hemiola_search.judge import Judge

ROOT: Final = Path(__file__).parents[1]
SCRIPT: Final = ROOT / "scripts" / "train_shapes.py"
SHAPES: Final = ROOT / "examples" / "shapes"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("train_shapes")


@pytest.fixture
def world(script: ModuleType) -> ModuleType:
    return importlib.import_module("shapes")


@pytest.fixture
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(SHAPES / "tokenizer")


@pytest.fixture
def text_encoder() -> Any:
    return transformers.T5EncoderModel.from_pretrained(SHAPES / "text_encoder", dtype=torch.float32).eval()


def renders(script: ModuleType, caption: str, count: int = 200) -> Tensor:
    """Draw the scene of a caption: pictures (count, 32, 32, 3) in [0, 1]."""
    scene = script.scenes()[script.scene_of_captions()[caption]]
    attributes = torch.tensor([scene.attributes()] * count)
    pictures: Tensor = script.as_pictures(script.render(attributes, torch.Generator().manual_seed(0)))
    return pictures


def painted(world: ModuleType, pictures: Tensor, colour: str) -> Tensor:
    """Return where pictures (B, 32, 32, 3) have a colour of the palette: (B, 32, 32)."""
    near: Tensor = (pictures - torch.tensor(world.COLOURS[colour])).abs().amax(-1) < 0.1
    return near


@pytest.mark.parametrize(
    ("relation", "axis", "is_red_first"),
    [("left of", 1, True), ("right of", 1, False), ("above", 0, True), ("below", 0, False)],
)
@pytest.mark.parametrize("shapes", [("circle", "square"), ("triangle", "triangle")])
def test_a_render_has_the_named_colours_on_the_right_sides(
    script: ModuleType, world: ModuleType, relation: str, axis: int, is_red_first: bool, shapes: tuple[str, str]
) -> None:
    pictures = renders(script, f"a red {shapes[0]} {relation} a blue {shapes[1]}")
    first, second = ("red", "blue") if is_red_first else ("blue", "red")
    for picture in pictures:
        last = painted(world, picture[None], first)[0].nonzero()[:, axis].max()
        start = painted(world, picture[None], second)[0].nonzero()[:, axis].min()
        assert last + 2 <= start  # white between them, however soft the edges are


@pytest.mark.parametrize(("shape", "share"), [("circle", np.pi / 4), ("square", 0.81), ("triangle", 0.5)])
def test_a_single_covers_its_shape_of_a_square_of_its_radius(
    script: ModuleType, world: ModuleType, shape: str, share: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    radii, _ = world.place(torch.zeros(200, dtype=torch.long), torch.Generator().manual_seed(0))
    attributes = torch.tensor([world.Scene("single", ("black", shape)).attributes()] * 200)
    covered = (script.render(attributes, generator)[:, :, :, :] < 0).all(1).sum((1, 2))
    torch.testing.assert_close(covered.float().mean(), (share * (2 * radii[:, 0]).square()).mean(), rtol=0.05, atol=0)


def test_a_scene_has_two_captions_if_it_has_two_objects(script: ModuleType) -> None:
    scene_of = script.scene_of_captions()
    assert len(script.scenes()) == 18 + 2 * 18 * 17  # singles, and two layouts of ordered pairs that differ
    assert len(scene_of) == 18 + 4 * 18 * 17  # a pair is said from either side
    assert scene_of["a red circle left of a blue square"] == scene_of["a blue square right of a red circle"]
    assert scene_of["a red circle above a blue square"] == scene_of["a blue square below a red circle"]
    assert scene_of["a red circle left of a blue square"] != scene_of["a red circle right of a blue square"]


def test_captions_and_scenes_lead_to_each_other(script: ModuleType) -> None:
    known = script.scenes()
    for caption, index in script.scene_of_captions().items():
        said = caption.replace(" left of ", "|").replace(" right of ", "|").replace(" above ", "|")
        objects = [tuple(each.split()[1:]) for each in said.replace(" below ", "|").split("|")]
        scene = known[index]
        is_reversed = "right of" in caption or "below" in caption
        assert [scene.first, *([scene.second] if scene.second else [])] == (objects[::-1] if is_reversed else objects)
        assert (scene.layout == "single") == (len(objects) == 1)
        assert (scene.layout == "stacked") == ("above" in caption or "below" in caption)
        assert caption in scene.captions()


def test_no_two_scenes_share_their_attributes(script: ModuleType) -> None:
    table = script.attribute_table()
    assert len(table.unique(dim=0)) == len(script.scenes())
    assert (table.sum(1) == len(script.HEADS)).all()  # one value a head


def test_what_is_held_out_are_pairs_alone_and_a_few_per_cent(script: ModuleType) -> None:
    held_out = script.held_out_scenes(0)
    assert len(held_out) == 31  # 5 % of 612
    assert all(script.scenes()[index].second is not None for index in held_out)


def test_the_rule_reads_renders(script: ModuleType) -> None:
    pictures, chosen = script.draw_scenes(500, torch.Generator().manual_seed(4))
    assert script.rule_agreement(pictures, chosen) >= 0.99


def test_the_rule_sees_no_scene_in_three_objects_or_none(script: ModuleType, world: ModuleType) -> None:
    picture = renders(script, "a red circle left of a blue square", 1)[0].numpy()
    picture[:3, :3] = 0.1
    assert world.read_by_rule(picture) is None
    assert world.read_by_rule(np.ones_like(picture)) is None


def test_the_tokenizer_knows_every_caption(script: ModuleType, tokenizer: Any) -> None:
    captions = [*script.scene_of_captions()]
    ids, mask = script.tokens_of(tokenizer, captions)
    assert ids.shape == (len(captions), tokenizer.model_max_length)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == captions
    assert tokenizer.unk_token_id not in ids
    assert ((ids == 0) == (mask == 0)).all()  # padding, and nothing else, is masked
    assert (ids.gather(1, mask.sum(1, keepdim=True) - 1) == tokenizer.eos_token_id).all()


def test_the_tokenizer_takes_the_empty_prompt_capitals_and_strangers(tokenizer: Any) -> None:
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]
    assert tokenizer("A RED Circle").input_ids == tokenizer("a red circle").input_ids
    assert tokenizer("a pink, circle").input_ids.count(tokenizer.unk_token_id) == 2


def test_the_text_encoder_does_not_see_padding_but_does_see_order(
    script: ModuleType, tokenizer: Any, text_encoder: Any
) -> None:
    prompts = ["a red circle left of a blue square", "a blue square left of a red circle"]
    embeddings, mask = script.embed(tokenizer, text_encoder, prompts)
    bare = torch.tensor([tokenizer(prompt).input_ids for prompt in prompts])
    with torch.inference_mode():
        unpadded = text_encoder(input_ids=bare).last_hidden_state
    num_tokens = bare.shape[1]
    assert mask.sum(1).tolist() == [num_tokens] * 2
    torch.testing.assert_close(embeddings[:, :num_tokens], unpadded, rtol=1e-4, atol=1e-4)
    assert (unpadded[0, -1] - unpadded[1, -1]).abs().max() > 0.1  # `</s>`, the same token, says something else


def test_the_committed_judge_reads_fresh_renders(script: ModuleType) -> None:
    judge = Judge(SHAPES / "judge")
    pictures, chosen = script.draw_scenes(1500, torch.Generator().manual_seed(99))
    read, features = judge.look(pictures.numpy())
    assert (read == chosen.numpy()).mean() >= 0.99
    assert judge.frechet(features[:1000]) < 0.05 * judge.frechet(features[:1000] + features.std(0))


def test_the_committed_prompts_are_the_grammar(script: ModuleType) -> None:
    assert json.loads((SHAPES / "judge" / "prompts.json").read_text()) == script.scene_of_captions()


def test_the_committed_folder_is_small_enough_for_git() -> None:
    assert sum(path.stat().st_size for path in SHAPES.rglob("*") if path.is_file()) < 25e6


def test_pixart_s_pipeline_draws_what_the_script_draws_and_the_judge_reads_it(
    script: ModuleType, tokenizer: Any, text_encoder: Any
) -> None:
    record = json.loads((SHAPES / "training.json").read_text())
    transformer = diffusers.PixArtTransformer2DModel.from_pretrained(
        SHAPES / "transformer", torch_dtype=torch.float32, low_cpu_mem_usage=False
    ).eval()
    scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(SHAPES / "scheduler")
    prompts = [
        "a green triangle",
        "a red circle left of a blue square",
        "a yellow square right of a purple square",
        "a black triangle above a yellow circle",
        "a blue circle below a blue triangle",
        "a purple triangle left of a green circle",
    ]
    settings = {key: record[key] for key in ("num_inference_steps", "guidance_scale")}
    text, nothing = (script.embed(tokenizer, text_encoder, each) for each in (prompts, [""]))
    samples = script.sample(transformer, scheduler, text, nothing, seed=3, **settings)
    pipeline = diffusers.PixArtAlphaPipeline(tokenizer, text_encoder, None, transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        prompts,
        latents=torch.randn((len(prompts), 3, 32, 32), generator=torch.Generator().manual_seed(3)),
        height=256,  # 8 times the latents: the pipeline supposes a VAE
        width=256,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="latent",
        return_dict=False,
        **settings,
    )[0]
    # The pipeline pads to 120 tokens, the script to 16: masked, they change nothing but the order of sums.
    torch.testing.assert_close(drawn, samples, rtol=0, atol=1e-3)
    read, _ = Judge(SHAPES / "judge").look(script.as_pictures(samples).numpy())
    right = sum(script.scene_of_captions()[prompt] == scene for prompt, scene in zip(prompts, read, strict=True))
    assert right >= len(prompts) - 1  # one slip in six is bad luck, two are a worse model than the record tells of


def test_the_script_runs_from_end_to_end(tmp_path: Path) -> None:
    settings = ["--iterations=2", "--batch-size=4", "--judge-iterations=2", "--text-iterations=2", "--no-compile"]
    settings += ["--record-samples=4", "--steps=2", "--renders=100", "--guidance-scale=2"]
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path / "shapes"), *settings],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    written = {str(path.relative_to(tmp_path / "shapes")) for path in (tmp_path / "shapes").rglob("*.*")}
    assert written == {str(path.relative_to(SHAPES)) for path in SHAPES.rglob("*.*")}
    record = json.loads((tmp_path / "shapes" / "training.json").read_text())
    committed = json.loads((SHAPES / "training.json").read_text())
    assert record.keys() == committed.keys()
    assert (record["samples"], record["guidance_scale"], record["num_inference_steps"]) == (4, 2.0, 2)
    for part in ("transformer", "text_encoder"):
        written_config, config = (
            json.loads((folder / part / "config.json").read_text()) for folder in (tmp_path / "shapes", SHAPES)
        )
        assert written_config == config
