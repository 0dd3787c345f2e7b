"""Laws of the project: what may import what, what a wheel holds, what the README promises."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bundles import Made

ROOT = Path(__file__).parents[1]
STAGES = ("hemiola", "hemiola_search", "hemiola_export", "hemiola_engines", "hemiola_runtime")


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "onnx_ir", "onnxscript", "diffusers", "transformers", "scipy",
                                      "PIL", "tqdm", "matplotlib", "polygraphy", "hemiola_search", "hemiola_export",
                                      "hemiola_engines"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.parametrize(("fixture", "subjects"), [("latent", "labels=[1]"), ("text", "prompts=['a red circle']")])
def test_the_runtime_draws_images_with_numpy_and_one_backend_only(
    fixture: str, subjects: str, request: pytest.FixtureRequest
) -> None:
    made: Made = request.getfixturevalue(fixture)
    code = (
        BLOCKED
        + f"""
from hemiola import Sampler
with Sampler.open(sys.argv[1]) as sampler:
    print(sampler.generate({subjects}, seeds=[2]).images.shape)
"""
    )
    assert python(code, str(made.bundle)).strip() == "(1, 16, 16, 3)"


def test_importing_hemiola_imports_nothing_heavy() -> None:
    loaded = python("import sys, hemiola, hemiola_runtime; print(*sys.modules)").split()
    assert not {"numpy", "torch", "onnx", "onnxruntime", "diffusers", "PIL"} & set(loaded)


def test_contracts_need_the_standard_library_only() -> None:
    code = (
        "import sys, hemiola_runtime.schedule, hemiola_runtime.manifest, hemiola_runtime.program; print(*sys.modules)"
    )
    assert "numpy" not in python(code).split()


@pytest.mark.parametrize("name", STAGES)
def test_every_module_says_what_it_is(name: str) -> None:
    folder = Path(str(importlib.import_module(name).__file__)).parent
    for path in folder.rglob("*.py"):
        assert path.read_text().startswith('"""'), f"{path.name} has no docstring"
        assert len(path.read_text().splitlines()) <= 400, f"{path.name} holds more than one idea"


def test_a_wheel_holds_every_stage_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert roots == set(STAGES)
    assert "hemiola_search/templates/report.html.j2" in names
    assert all(f"{stage}/py.typed" in names for stage in STAGES)


def test_the_readme_opens_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    first_block = re.search(r"```(?:bash|sh)?\n(.*?)```", text, re.DOTALL)
    assert first_block is not None
    commands = [line.partition("#")[0].strip() for line in first_block[1].splitlines() if line.strip()]
    assert commands == ["bash scripts/build_engines.sh", "bash scripts/test.sh"]
    for command in commands:
        assert (ROOT / command.split()[1]).is_file()


def test_every_command_of_the_readme_is_one_that_exists() -> None:
    from hemiola.cli import COMMANDS

    text = (ROOT / "README.md").read_text()
    used = set(re.findall(r"^\s*hemiola (\w+)", text, re.MULTILINE))
    assert used == set(COMMANDS)
