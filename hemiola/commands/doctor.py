"""Say what is installed, what works here, and the command that mends what does not.

With a bundle: check every byte of it, and say whether it runs here, as the exit code does.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hemiola_runtime.errors import HemiolaError

if TYPE_CHECKING:
    from hemiola_runtime.manifest import BackendSpec

STAGES: Final = {  # what each stage imports: module, distribution, extra
    "runtime on a CPU": [("numpy", "numpy", ""), ("onnxruntime", "onnxruntime", "cpu"), ("PIL", "pillow", "cpu")],
    "prompts": [("tokenizers", "tokenizers", "text")],
    "search and export": [
        ("torch", "torch", "search"),
        ("diffusers", "diffusers", "search"),
        ("transformers", "transformers", "search"),
        ("onnx", "onnx", "search"),
        ("onnxscript", "onnxscript", "search"),
        ("scipy", "scipy", "search"),
        ("matplotlib", "matplotlib", "search"),
        ("jinja2", "jinja2", "search"),
    ],
}
ANY_VERSION: Final = "0"  # older than every library: asks whether one runs engines here at all


@dataclass(frozen=True, slots=True)
class Examined:
    """What a backend can do on this machine.

    Attributes:
        name: of the backend.
        version: of the library that builds; None where there is none.
        build_obstacle: why it does not build here, and what would mend that; None if it does.
        run_obstacle: why its engines do not run here, and what would mend that; None if they do.
    """

    name: str
    version: str | None
    build_obstacle: str | None
    run_obstacle: str | None

    def __str__(self) -> str:
        """One line that a script can search, and one for each obstacle."""
        builds = "does not build here" if self.build_obstacle else "builds here"
        runs = "does not run here" if self.run_obstacle else "runs here"
        joined = "but" if bool(self.build_obstacle) != bool(self.run_obstacle) else "and"
        version = f" ({self.version})" if self.version else ""
        lines = [f"backend {self.name}: {builds} {joined} {runs}{version}"]
        if self.build_obstacle:
            lines.append(f"  to build: {self.build_obstacle}")
        if self.run_obstacle and self.run_obstacle != self.build_obstacle:
            lines.append(f"  to run: {self.run_obstacle}")
        return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="folder from `hemiola build`")


def run(options: argparse.Namespace) -> int:
    """Examine this machine, or what a bundle needs of it."""
    if options.bundle is not None:
        return _examine_bundle(options.bundle)
    from hemiola_runtime.artifacts import in_words
    from hemiola_runtime.backends import BACKENDS
    from hemiola_runtime.memory import available_host_bytes

    write = sys.stdout.write
    write(f"hemiola {metadata.version('hemiola')}, Python {platform.python_version()}, {platform.platform()}\n")
    free = available_host_bytes()
    if free is not None:
        write(f"free memory: {in_words(free)}\n")
    write(f"GPU: {_gpu()}\n")
    for stage, modules in STAGES.items():
        missing = [(name, extra) for module, name, extra in modules if not _is_found(module)]
        found = [f"{name} {_version(name)}" for module, name, _ in modules if _is_found(module)]
        write(f"{stage}: {'works' if not missing else 'is not complete'} ({', '.join(found) or 'nothing found'})\n")
        for name, extra in missing:
            write(f"  {name} is missing; install it with: pip install 'hemiola[{extra}]'\n")
    examined = [examine(name) for name in BACKENDS]
    for backend in examined:
        write(f"{backend}\n")
    write(f"onnxruntime has the providers: {_providers()}\n")
    return 0 if any(backend.run_obstacle is None for backend in examined) else 1


def _examine_bundle(bundle: Path) -> int:
    from hemiola_runtime.bundle import open_bundle
    from hemiola_runtime.graph_set import TOKENIZER_FILE

    opened = open_bundle(bundle)
    reason = _run_obstacle(opened.manifest.backend)
    if reason is None and (text := opened.manifest.pipeline.text) is not None:
        reason = _text_obstacle(opened.files[TOKENIZER_FILE], text.num_tokens)
    sys.stdout.write(f"{bundle} runs here\n" if reason is None else f"{bundle} does not run here: {reason}\n")
    return 0 if reason is None else 1


def examine(name: str) -> Examined:
    """Find out whether a backend builds here, and whether its engines run here; never raises."""
    from hemiola_engines.build import BUILDERS
    from hemiola_engines.options import BuildOptions
    from hemiola_runtime.manifest import BackendSpec

    version, build_obstacle = None, None
    gpu: str | None = None
    capabilities: tuple[str, ...] = ()
    try:
        builder = BUILDERS[name]
        version = builder.version()
        gpu, capabilities = builder.target(BuildOptions(name, max_batch_size=1))
    except Exception as error:  # a library that is half installed raises whatever it meets
        build_obstacle = _reason(error)
    # What this machine would build. Where it builds nothing, engines from elsewhere may run all the same: TensorRT's
    # lean runtime builds none.
    spec = BackendSpec(name, version or ANY_VERSION, gpu, capabilities, is_version_compatible=version is None)
    return Examined(name, version, build_obstacle, _run_obstacle(spec))


def _run_obstacle(spec: BackendSpec) -> str | None:
    from hemiola_runtime.backends import entry_of, obstacle

    extra = entry_of(spec.name).extra
    if spec.name.startswith("onnxruntime") and not _is_found("onnxruntime"):
        return f"onnxruntime is not installed. Install it with: pip install 'hemiola[{extra}]'"
    try:
        return obstacle(spec)
    except Exception as error:  # as above
        return _reason(error)


def _text_obstacle(tokenizer: bytes, num_tokens: int) -> str | None:
    from hemiola_runtime.text import check_tokenizer

    try:
        check_tokenizer(tokenizer, num_tokens)
    except HemiolaError as error:
        return str(error)
    return None


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, HemiolaError) else f"{type(error).__name__}: {error}"


def _gpu() -> str:
    """Describe the GPU, or say why none can be used."""
    from hemiola_runtime.artifacts import in_words
    from hemiola_runtime.backends import cuda
    from hemiola_runtime.bench import gpu_state

    if (reason := cuda.obstacle()) is not None:
        return f"none that can be used: {reason}"
    try:
        runtime = cuda.Cuda()
        gpu, version = runtime.gpu, runtime.call("cudaDriverGetVersion")
    except HemiolaError as error:
        return f"none that can be used: {error}"
    release = gpu_state().get("driver_version")
    driver = f"driver {release}, which knows" if release else "its driver knows"
    return (
        f"{gpu.name}, compute capability {gpu.compute_capability}, {in_words(gpu.total_bytes)}, "
        f"{driver} CUDA {version // 1000}.{version % 1000 // 10}"
    )


def _is_found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(distribution: str) -> str:
    """Version of an importable module's distribution; onnxruntime-gpu holds the module onnxruntime too."""
    for name in (distribution, f"{distribution}-gpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "of unknown version"


def _providers() -> str:
    """Say which providers ONNX Runtime has here."""
    if not _is_found("onnxruntime"):
        return "it is not installed"
    import onnxruntime

    return ", ".join(onnxruntime.get_available_providers())
