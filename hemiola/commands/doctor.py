"""Say what is installed, what works here, and the command that mends what does not."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from importlib import metadata
from typing import Final

STAGES: Final = {  # what each stage imports: module, distribution, extra
    "runtime on a CPU": [("numpy", "numpy", ""), ("onnxruntime", "onnxruntime", "cpu"), ("PIL", "pillow", "cpu")],
    "search and export": [
        ("torch", "torch", "search"),
        ("diffusers", "diffusers", "search"),
        ("onnx", "onnx", "search"),
        ("onnxscript", "onnxscript", "search"),
        ("scipy", "scipy", "search"),
        ("matplotlib", "matplotlib", "search"),
        ("jinja2", "jinja2", "search"),
    ],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""


def run(options: argparse.Namespace) -> int:
    """Examine this machine."""
    from hemiola_runtime.artifacts import in_words
    from hemiola_runtime.memory import available_host_bytes

    write = sys.stdout.write
    write(f"hemiola {metadata.version('hemiola')}, Python {platform.python_version()}, {platform.platform()}\n")
    free = available_host_bytes()
    if free is not None:
        write(f"free memory: {in_words(free)}\n")
    is_serving = True
    for stage, modules in STAGES.items():
        missing = [(name, extra) for module, name, extra in modules if importlib.util.find_spec(module) is None]
        found = [
            f"{name} {metadata.version(name)}"
            for module, name, _ in modules
            if importlib.util.find_spec(module) is not None
        ]
        write(f"{stage}: {'works' if not missing else 'is not complete'} ({', '.join(found) or 'nothing found'})\n")
        for name, extra in missing:
            write(f"  {name} is missing; install it with: pip install 'hemiola[{extra}]'\n")
        is_serving = is_serving and (stage != "runtime on a CPU" or not missing)
    write(f"backend onnxruntime: {_onnxruntime()}\n")
    return 0 if is_serving else 1


def _onnxruntime() -> str:
    """Say which providers ONNX Runtime has here."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "not installed"
    import onnxruntime

    return f"providers {', '.join(onnxruntime.get_available_providers())}"
