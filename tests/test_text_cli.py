"""The commands on a model that draws prompts: all stages, what they say, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from PIL import Image

from bundles import SELECTOR
from commands import FOUND, SEARCH, MadeByCommands, check_message, done, make_by_commands, missing, python, refused
from hemiola.cli import main
from hemiola_runtime.manifest import read_manifest
from models import save_tiny_text_model, tiny_pixart

PROMPTS: Final = ("a red circle", "a green square left of it", "a blue triangle")
LONG: Final = "a red circle left of a green square"  # 8 words and the end, where 8 tokens are read
SIZES: Final = ("--min-size", "8x8", "--max-size", "24x24", "--tile-size", 16)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> MadeByCommands:
    """What the commands make of a tiny PixArt, for pictures of 8 to 24 pixels."""
    folder = tmp_path_factory.mktemp("text_cli")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n\n".join(PROMPTS) + "\n")
    model = save_tiny_text_model(folder / "model", transformer=tiny_pixart(num_blocks=2))
    selector = replace(SELECTOR, score="cross_attention_entropy")
    return make_by_commands(folder, model, selector=selector, searching=("--prompts", prompts), exporting=SIZES)


def test_every_stage_says_what_it_wrote(drawn: MadeByCommands) -> None:
    assert drawn.said["search"].startswith(f"{FOUND}\n")
    assert drawn.said["search"].endswith(f"wrote {drawn.found}\n")
    assert drawn.said["export"] == (
        f"wrote {drawn.graphs} in fp32: text_encoder, conditioning, full, tokens, reuse, vae_decoder; "
        "schedules procache, plain, full\n"
    )
    assert drawn.said["build"].startswith(f"wrote {drawn.bundle}\nrelative L2 against PyTorch: procache ")


def test_run_draws_a_row_of_pictures_and_reports_what_became_of_prompts(
    drawn: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "two.png", tmp_path / "report.json"
    subjects = ["--prompt", "a red circle", "--prompt", "a square", "--seed", 3, "--height", 24, "--width", 8]
    said = done(capsys, "run", drawn.bundle, *subjects, "--out", out, "--report", report)
    assert said.startswith(f"procache: {drawn.rhythm}\n")
    with Image.open(out) as picture:
        assert picture.size == (2 * 64, 192)  # two pictures of 24 × 8, each pixel 8 × 8
    written = json.loads(report.read_text())
    assert (written["rhythm"], written["batch_size"]) == (drawn.rhythm, 2)
    assert written["text"] == {"num_kept": 1, "num_encoded": 3, "truncated": {}, "unknown": {}}


def test_a_picture_depends_on_prompt_negative_prompt_seed_and_size_alone(
    drawn: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def picture(*arguments: object) -> bytes:
        done(capsys, "run", drawn.bundle, *arguments, "--out", tmp_path / "one.png")
        return (tmp_path / "one.png").read_bytes()

    plain = picture("--prompt", "a red circle")
    same = [("--seed", 0), ("--negative-prompt", ""), ("--height", 16), ("--guidance-scale", 4.5)]
    assert all(picture("--prompt", "a red circle", *arguments) == plain for arguments in same)
    other = [("--seed", 1), ("--negative-prompt", "green"), ("--height", 24), ("--guidance-scale", 2)]
    assert all(picture("--prompt", "a red circle", *arguments) != plain for arguments in other)
    assert picture("--prompt", "a blue circle") != plain


def test_later_pictures_have_later_seeds(
    drawn: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, second = tmp_path / "both.png", tmp_path / "second.png"
    done(capsys, "run", drawn.bundle, "--prompt", "a square", "--prompt", "a circle", "--seed", 4, "--out", both)
    done(capsys, "run", drawn.bundle, "--prompt", "a circle", "--prompt", "a", "--seed", 5, "--out", second)
    with Image.open(both) as pair, Image.open(second) as single:
        np.testing.assert_array_equal(np.asarray(pair)[:, 64:], np.asarray(single)[:, :64])


def test_words_that_the_text_encoder_does_not_know_are_warned_of_and_reported(
    drawn: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    arguments = ["--prompt", "a pink cat", "--out", str(tmp_path / "one.png"), "--report", str(report)]
    assert main(["run", str(drawn.bundle), *arguments]) == 0
    said = capsys.readouterr().err
    assert said == "warning: of the prompt 'a pink cat' the text encoder does not know 'pink', 'cat'\n"
    assert json.loads(report.read_text())["text"]["unknown"] == {"a pink cat": ["pink", "cat"]}


def test_a_prompt_whose_end_was_not_read_is_warned_of(
    drawn: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prompt", LONG, "--prompt", "a square", "--out", str(tmp_path / "two.png")]
    assert main(["run", str(drawn.bundle), *arguments]) == 0
    said = capsys.readouterr()
    assert said.err == f"warning: the prompt {LONG!r} has 9 tokens; its end was not read\n"
    assert said.out.startswith(f"procache: {drawn.rhythm}\n")


def test_a_real_process_draws_the_same_picture(
    drawn: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "here.png", tmp_path / "there.png"
    arguments = ["--prompt", "a red circle", "--height", "24", "--out"]
    done(capsys, "run", drawn.bundle, *arguments, here)
    command = [sys.executable, "-m", "hemiola", "run", str(drawn.bundle), *arguments, str(there)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert there.read_bytes() == here.read_bytes()


def test_verify_compares_every_schedule_and_every_forward_with_pytorch(
    drawn: MadeByCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    said = done(capsys, "verify", drawn.bundle, "--reference", drawn.model)
    assert f"procache: ran {drawn.rhythm}\n" in said
    assert said.count("  relative L2 against PyTorch") == 3
    parts = ["one `full`: ", "one `tokens`: ", "one `reuse`: "]
    assert missing(parts, said) == []
    assert set(read_manifest(drawn.bundle).forward_parity) >= {"full", "tokens", "reuse"}


def test_report_draws_the_prompts_of_the_search(
    drawn: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    measured = ["--images", 2, "--batch-size", 2, "--repeats", 1]
    said = done(capsys, "report", drawn.bundle, "--search", drawn.record, "--out", out, *measured)
    assert f"wrote {out}, report.json and report.png" in said
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert list(numbers["measured"]) == ["full", "procache", "plain"]
    assert set(numbers["search"]["prompts"]) <= set(PROMPTS)
    assert len(numbers["search"]["prompts"]) > 0
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.width == 2 * 64


def test_bench_measures_every_schedule(
    drawn: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    done(capsys, "bench", drawn.bundle, "--repeats", 2, "--batch-size", 2, "--threads", 1, "--out", out)
    assert set(json.loads(out.read_text())["measured"]) == {"full", "procache", "plain"}


@pytest.mark.parametrize("artifact", ["schedule", "graphs", "bundle", "record"])
def test_inspect_shows_any_artifact(drawn: MadeByCommands, artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = done(capsys, "inspect", getattr(drawn, artifact))
    model = "2 blocks, width 48, 16 tokens, latents 4×8×8, prompts of up to 8 tokens"
    images = "images 16×16×3, from 8×8 to 24×24, decoded in tiles of 16 pixels where larger"
    shown = {
        "schedule": ["schedule for model (pixart), ", f"  {drawn.rhythm}\n", "tokens [4] by cross_attention_entropy"],
        "graphs": [model, images, "  text_encoder ", "  vae_decoder ", "schedules procache, plain, full"],
        "bundle": [model, images, " text and tiles + 1 × (", "  caches among it: ", " for 1 image, ", " for 2 images"],
        "record": ["search of model, ", f", guidance 4.5: {FOUND}\n", "was chosen", "| uncached |"],
    }
    assert missing(shown[artifact], said) == []
    assert "labels" not in said


BAD_REQUESTS = [
    (["--label", "1"], ["this bundle draws images of prompts, not of labels"]),
    (["--prompt", "a cat", "--height", "12"], ["height is a multiple of 8 from 8 to 24 pixels in this bundle, not 12"]),
    (["--prompt", "a cat", "--width", "32"], ["width is a multiple of 8 from 8 to 24 pixels in this bundle, not 32"]),
    (["--prompt", "a"] * 3, ["3 images in one request", "1 to 2", "--max-batch-size 3"]),
    (["--prompt", "a cat", "--seed", "-1"], ["seed -1 is not a whole number from 0"]),
    (["--prompt", "a cat", "--schedule", "fast"], ["no schedule 'fast'", "it has procache, plain, full"]),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD_REQUESTS, ids=[" ".join(row[0]) for row in BAD_REQUESTS])
def test_a_request_that_the_bundle_cannot_do_is_refused(
    drawn: MadeByCommands, tmp_path: Path, arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "run", drawn.bundle, *arguments, "--out", tmp_path / "one.png")
    assert missing(parts, message) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--prompt", "a cat"], "this bundle draws images of labels, not of prompts"),
        (["--label", "1", "--negative-prompt", "a cat"], "this bundle draws images of labels, not of prompts"),
        (["--label", "1", "--height", "16"], "height is 8 pixels in this bundle, not 16; export with --min-size and"),
    ],
)
def test_a_bundle_of_labels_refuses_what_is_for_prompts(
    made: MadeByCommands, tmp_path: Path, arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in refused(capsys, "run", made.bundle, *arguments, "--out", tmp_path / "one.png")
    assert list(tmp_path.iterdir()) == []


def test_a_search_without_prompts_is_refused(
    drawn: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "search", drawn.model, *SEARCH, "--out", tmp_path / "schedule.json")
    assert missing(["the model draws prompts", "one on each line", "--prompts"], message) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["cannot read the prompts", "No such file"]),
        (b"", ["holds no prompt; write one on each line"]),
        (b"\n  \n", ["holds no prompt; write one on each line"]),
        (b"\xff\xfe", ["cannot read the prompts", "utf-8"]),
    ],
)
def test_a_search_is_refused_without_a_file_of_prompts_that_can_be_read(
    drawn: MadeByCommands, tmp_path: Path, content: bytes | None, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    if content is not None:
        prompts.write_bytes(content)
    arguments = [*SEARCH, "--prompts", prompts, "--out", tmp_path / "out" / "schedule.json"]
    message = refused(capsys, "search", drawn.model, *arguments)
    assert missing([*parts, str(prompts)], message) == []
    assert not (tmp_path / "out").exists()


def test_a_search_for_a_model_of_labels_takes_no_prompts(
    made: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SEARCH, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "schedule.json"]
    message = refused(capsys, "search", made.model, *arguments)
    assert "the model draws images of labels; leave --prompts out" in message


def test_a_model_of_labels_has_no_cross_attention_to_select_by(
    made: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SEARCH, "--selector", "cross_attention_entropy", "--out", tmp_path / "schedule.json"]
    message = refused(capsys, "search", made.model, *arguments)
    assert "the selector cross_attention_entropy needs cross-attention, which dit has not" in message
    assert list(tmp_path.iterdir()) == []


BAD_SIZES = [
    (["--min-size", "7x8"], ["a latent becomes 2 pixels, which does not divide (7, 8)"]),
    (["--min-size", "12x8"], ["the smallest and the largest height are multiples of 8 pixels"]),
    (["--max-size", "16x28"], ["the smallest and the largest width are multiples of 8 pixels"]),
    (["--max-size", "8x16"], ["the model's own height lies between the smallest and the largest: not 16 ≤ 16 ≤ 8"]),
    (["--min-size", "0x16"], ["the model's own height lies between the smallest and the largest: not 0 ≤ 16 ≤ 16"]),
    (["--max-size", "24x24", "--tile-size", "6"], ["a tile is a multiple of 4 pixels, not 6"]),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD_SIZES, ids=[" ".join(row[0]) for row in BAD_SIZES])
def test_sizes_that_the_model_does_not_draw_are_refused(
    drawn: MadeByCommands, tmp_path: Path, arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    exported = ["--schedule", drawn.schedule, *arguments, "--out", tmp_path / "graphs"]
    message = refused(capsys, "export", drawn.model, *exported)
    assert missing(parts, message) == []
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_one_size_is_not_exported_for_more(
    made: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--schedule", made.schedule, "--max-size", "16x16", "--out", tmp_path / "graphs"]
    assert "a model of the family dit draws pictures of one size" in refused(capsys, "export", made.model, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "bundle", "--out", "x.png"], "one of the arguments --label --prompt is required"),
        (["run", "bundle", "--label", "1", "--prompt", "a", "--out", "x.png"], "--prompt: not allowed with argument"),
        (["run", "bundle", "--prompt", "a", "--height", "0", "--out", "x.png"], "--height: a whole number of 1 or"),
        (["export", "model", "--schedule", "x", "--out", "y", "--min-size", "16"], "--min-size: height and width in"),
        (["export", "model", "--schedule", "x", "--out", "y", "--max-size", "16x-8"], "as in 512x768, not '16x-8'"),
        (["export", "model", "--schedule", "x", "--out", "y", "--tile-size", "0"], "--tile-size: a whole number of 1"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_tokenizers_is_named_with_the_command_that_installs_it(drawn: MadeByCommands, tmp_path: Path) -> None:
    code = "import sys; sys.modules['tokenizers'] = None; from hemiola.cli import main; sys.exit(main(sys.argv[1:]))"
    ran = python(code, "run", drawn.bundle, "--prompt", "a cat", "--out", tmp_path / "one.png")
    assert ran.returncode == 1
    check_message(ran.stderr)
    assert missing(["tokenizers cannot be imported", "pip install 'hemiola[text]'"], ran.stderr) == []
    assert list(tmp_path.iterdir()) == []
