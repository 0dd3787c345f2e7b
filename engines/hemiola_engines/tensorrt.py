"""The builder for TensorRT and TensorRT-RTX, which have one API: an ONNX graph becomes an engine, in a child process.

TensorRT builds for the GPU of the machine it builds on. TensorRT-RTX builds for a list of compute capabilities, needs
no GPU to do so, and leaves the choice of kernels to the machine that runs the engine.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, ClassVar, Final

from hemiola_engines.builder import EngineJob, Progress, check_source
from hemiola_engines.errors import BuildError
from hemiola_engines.options import BuildOptions
from hemiola_engines.tensorrt_child import Message, Range, Request
from hemiola_runtime.artifacts import in_words
from hemiola_runtime.backends import cuda
from hemiola_runtime.codec import encode, parse
from hemiola_runtime.graphs import GraphFormat, GraphSpec, Precision
from hemiola_runtime.manifest import Profile

CHILD: Final = (sys.executable, "-P", "-m", "hemiola_engines.tensorrt_child")
RTX_CAPABILITIES: Final = ("8.0", "8.6", "8.9", "12.0", "12.1")  # all that 1.7 knows but 7.5, which lacks float32 GEMMs
LAST_WORDS: Final = 3  # lines of a process that died, for the message
STOP_SECONDS: Final = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TensorRT:
    """One of the two libraries.

    Attributes:
        module: to import.
        title: as its users call it.
        distributions: that hold the module, any one of them.
        extra: of Hemiola, which installs it.
        portable_to: compute capabilities that it builds for unless told; none if it builds for the GPU at hand.
        child: command of the building process.
    """

    extension: ClassVar[str] = "engine"
    format: ClassVar[GraphFormat] = "onnx"
    keeps_weight_file: ClassVar[bool] = False
    has_profiles: ClassVar[bool] = True

    module: str
    title: str
    distributions: tuple[str, ...]
    extra: str
    portable_to: tuple[str, ...] = ()
    child: tuple[str, ...] = CHILD

    def version(self) -> str:
        """Version of the installed library, which is not loaded for that.

        Raises:
            BuildError: none is installed.
        """
        for distribution in self.distributions:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                return importlib.metadata.version(distribution)
        raise BuildError(f"{self.title} is not installed. Install it with: pip install 'hemiola[{self.extra}]'")

    def check(self, options: BuildOptions, precision: Precision) -> None:
        """Refuse options that the library does not have; it has every precision.

        Raises:
            BuildError: with what it does have.
        """
        if options.optimization_level not in (None, *range(6)):
            raise BuildError(f"the optimization level is 0 to 5, not {options.optimization_level}")
        if self.portable_to:
            if options.timing_cache is not None or options.is_timing_cache_pinned:
                raise BuildError(
                    f"{self.title} times nothing when it builds, so it has no timing cache. Leave out --timing-cache "
                    "and --pin-timing-cache"
                )
            if options.is_version_compatible:
                raise BuildError(
                    f"engines of {self.title} run with the version that built them alone. "
                    "Leave out --version-compatible, or build with --backend tensorrt"
                )
            for capability in options.compute_capabilities:
                if capability not in self.portable_to:
                    raise BuildError(
                        f"{self.title} does not build these graphs for compute capability {capability!r}, only for "
                        f"{', '.join(self.portable_to)}"
                    )
        elif options.is_timing_cache_pinned and options.timing_cache is None:
            raise BuildError("there is no timing cache to pin. Name its folder with --timing-cache")
        elif options.compute_capabilities:
            raise BuildError(
                f"{self.title} builds for the GPU at hand alone. Leave out --compute-capability, or build with "
                "--backend tensorrt_rtx"
            )

    def target(self, options: BuildOptions) -> tuple[str | None, tuple[str, ...]]:
        """Return what engines are tied to: the GPU's name, None if any will do, and compute capabilities.

        Raises:
            BuildError: the library builds for the GPU at hand, and there is none.
        """
        if self.portable_to:
            return None, options.compute_capabilities or self.portable_to
        gpu = _gpu(self.title)
        return gpu.name, (gpu.compute_capability,)

    def build_engines(
        self, jobs: Sequence[EngineJob], options: BuildOptions, progress: Progress, *, rows_per_image: int
    ) -> None:
        """Write the engines of some graphs, one after the other: each may take most of the memory, and times kernels.

        Raises:
            BuildError: see `build_engine`.
        """
        for job in jobs:
            progress(f"engine {job.graph.name}")
            self.build_engine(
                job.graph, job.source, job.target, job.profiles, options, progress, rows_per_image=rows_per_image
            )

    def build_engine(
        self,
        graph: GraphSpec,
        source: Path,
        target: Path,
        profiles: Sequence[Profile],
        options: BuildOptions,
        progress: Progress,
        *,
        rows_per_image: int,
    ) -> None:
        """Write the engine of a graph, whole or not at all.

        Args:
            graph: its description.
            source: its ONNX file, with the weights beside it.
            target: the engine's file.
            profiles: the sizes that the engine takes and is tuned for.
            options: how to build.
            progress: told about once a second how far the build is; not at all if it is quick.
            rows_per_image: 2 under classifier-free guidance, else 1.

        Raises:
            BuildError: the file is not the one that was exported, or the library cannot build it so.
        """
        version = self.version()
        check_source(graph, source)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            request = Request(
                source=str(source),
                target=name,
                inputs=graph.inputs,
                outputs=graph.outputs,
                profiles=tuple(_ranges(graph, profile, rows_per_image) for profile in profiles),
                optimization_level=options.optimization_level,
                timing_cache=self._timing_cache(options, version),
                is_timing_cache_pinned=options.is_timing_cache_pinned,
                is_version_compatible=options.is_version_compatible,
                compute_capabilities=options.compute_capabilities or self.portable_to,
                level=logger.getEffectiveLevel(),
            )
            built = self._run(request, graph.name, progress)
            temporary.chmod(0o644)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        size, peak = in_words(target.stat().st_size), in_words(built.peak_bytes)
        logger.info("wrote %s (%s) in %.1f s, with %s of memory", target, size, built.seconds, peak)

    def _timing_cache(self, options: BuildOptions, version: str) -> str | None:
        """Return the file for this library, version and GPU: measurements of another are of no use."""
        if options.timing_cache is None:
            return None
        gpu, (capability,) = self.target(options)
        gpu_name = re.sub(r"\W+", "-", str(gpu))
        path = options.timing_cache / f"{self.module}-{version}-{gpu_name}-{capability}.timing"
        if options.is_timing_cache_pinned and not path.is_file():
            raise BuildError(
                f"the pinned timing cache has no {path}, the file of {self.title} {version} on this GPU. "
                "Build once without --pin-timing-cache"
            )
        return str(path)

    def _run(self, request: Request, name: str, progress: Progress) -> Message:
        """Let a child process build; returns its last message."""
        with subprocess.Popen(
            (*self.child, self.module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # an interruption from the terminal is for us; we pass it on
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            assert child.stderr is not None
            last_words: deque[str] = deque(maxlen=LAST_WORDS)
            listener = threading.Thread(target=_listen, args=(child.stderr, last_words), daemon=True)
            listener.start()
            try:
                with contextlib.suppress(BrokenPipeError):  # it died at once, and its status will say of what
                    child.stdin.write(json.dumps(encode(request)) + "\n")
                    child.stdin.flush()
                said = _follow(child.stdout, last_words, lambda text: progress(f"engine {name}: {text}"))
                child.wait()
            except BaseException:
                _stop(child)
                raise
            finally:
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.close()
                listener.join()
        if said.kind == "built" and child.returncode == 0:
            return said
        reason = said.text if said.kind == "failed" else _cause_of_death(child.returncode, said.peak_bytes, last_words)
        raise BuildError(f"{self.title} cannot build the engine `{name}`: {reason}")


TENSORRT: Final = TensorRT(
    module="tensorrt",
    title="TensorRT",
    distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    extra="tensorrt",
)
TENSORRT_RTX: Final = TensorRT(
    module="tensorrt_rtx",
    title="TensorRT-RTX",
    distributions=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    extra="tensorrt-rtx",
    portable_to=RTX_CAPABILITIES,
)


@dataclass(slots=True)
class Countdown:
    """Tells how far a build is; the percentage never goes back.

    A build is taken to go on as it went, on average, since its first second: what is done by then took no time.
    """

    begun: tuple[float, float] | None = field(default=None, init=False)
    reached: float = field(default=0.0, init=False)
    total_seconds: float = field(default=math.inf, init=False)
    share: float = field(default=0.0, init=False)

    def text(self, fraction: float, seconds: float) -> str:
        """Put into words that a fraction of the build was done after so many seconds."""
        if self.begun is None:
            self.begun, self.reached = (fraction, seconds), fraction
        if fraction > self.reached:
            first_fraction, first_seconds = self.begun
            rate = (fraction - first_fraction) / (seconds - first_seconds)
            self.reached, self.total_seconds = fraction, seconds + (1 - fraction) / rate
        if math.isinf(self.total_seconds):
            return f"{seconds:.0f} s so far"
        self.share = max(self.share, min(seconds / self.total_seconds, 0.99))
        return f"{100 * self.share:.0f} %, about {max(1.0, self.total_seconds - seconds):.0f} s left"


def _ranges(graph: GraphSpec, profile: Profile, rows_per_image: int) -> dict[str, Range]:
    """Return the shapes that a profile means for every input with a dynamic side."""

    def shape(sides: tuple[int | str, ...], place: int) -> tuple[int, ...]:
        numbers = {symbol: side[place] for symbol, side in profile.sides.items()}
        if "B" in numbers:
            numbers["R"] = rows_per_image * numbers["B"]
        if missing := [side for side in sides if isinstance(side, str) and side not in numbers]:
            raise BuildError(f"a profile of the engine `{graph.name}` says nothing of {', '.join(missing)}")
        return tuple(side if isinstance(side, int) else numbers[side] for side in sides)

    dynamic = [spec for spec in graph.inputs if any(isinstance(side, str) for side in spec.shape)]
    return {spec.name: (shape(spec.shape, 0), shape(spec.shape, 1), shape(spec.shape, 2)) for spec in dynamic}


def _gpu(title: str) -> cuda.Gpu:
    """Return the GPU, named as the runtime will name it."""
    if (reason := cuda.obstacle()) is not None:
        raise BuildError(
            f"{title} builds for the GPU at hand, but {reason}. Build on the machine that will run the engines, or "
            "with --backend tensorrt_rtx, which needs no GPU to build"
        )
    return cuda.Cuda().gpu


def _listen(stderr: IO[str], last_words: deque[str]) -> None:
    for line in stderr:
        logger.debug("%s", line.rstrip())
        last_words.append(line.strip())


def _follow(stdout: IO[str], last_words: deque[str], progress: Progress) -> Message:
    """Pass on what the child says until it falls silent; returns the last of it that is no log."""
    last, countdown, told = Message("progress"), Countdown(), ""
    for line in stdout:
        try:
            message = parse(Message, line, "message")
        except ValueError:
            logger.debug("%s", line.rstrip())
            last_words.append(line.strip())
            continue
        if message.kind == "log":
            logger.log(message.level, "%s", message.text)
            continue
        last = message
        if message.kind == "progress" and (text := countdown.text(message.fraction, message.seconds)) != told:
            progress(told := text)
    return last


def _stop(child: subprocess.Popen[str]) -> None:
    child.terminate()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _cause_of_death(status: int, peak_bytes: int, last_words: Sequence[str]) -> str:
    if status == -signal.SIGKILL:
        size = f"; the largest resident size it told was {in_words(peak_bytes)}" if peak_bytes else ""
        return (
            f"the building process was killed, most likely for want of memory{size}. "
            "Close other programs, or build on a machine with more memory"
        )
    how = f"crashed ({signal.Signals(-status).name})" if status < 0 else f"ended with status {status}"
    words = f"; the last it wrote was: {' / '.join(last_words)}" if last_words else ""
    return f"the building process {how} without a reason{words}"
