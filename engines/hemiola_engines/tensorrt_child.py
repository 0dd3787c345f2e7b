"""The process that builds one engine, with TensorRT or TensorRT-RTX: `python -m hemiola_engines.tensorrt_child MODULE`.

A builder may take all memory, crash or never return; in a process of its own it takes nothing with it. It reads one
`Request` as a line of JSON from stdin, answers with `Message`s as lines of JSON on stdout, and stops when stdin ends.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TextIO, TypeAlias

from hemiola_runtime.artifacts import write_bytes
from hemiola_runtime.backends.tensorrt import DTYPES
from hemiola_runtime.codec import encode, parse
from hemiola_runtime.graphs import TensorSpec

Range: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # smallest, likeliest, largest shape

VERBOSE: Final = 5  # TensorRT's thousands of lines for one engine, below logging.DEBUG
LEVELS: Final = {  # TensorRT's INFO is chatter by our measure, where INFO is one line per artifact
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.DEBUG,
    "VERBOSE": VERBOSE,
}
NO_DRIVER: Final = "cudaError 35"  # follows every error of TensorRT-RTX where there is no driver, which it does without
CHATTER: Final = (  # what is so by design: labels are int64, the values of `token_slots` do not matter
    "has Int64 binding",
    "is unused or used only at compile-time",
    "Unused Input",
    NO_DRIVER,
)
MISFIT: Final = "values are not self-consistent"  # TensorRT-RTX only warns of a profile that the network cannot take

# Share of a build's time that has passed when a phase begins and when it ends. Measured on blocks of DiT with
# TensorRT-RTX 1.7, which times nothing; TensorRT times tactics first. What follows the last phase is serialization.
SHARES: Final = {
    "Timing graph nodes": (0.0, 0.4),
    "Determining refit engines": (0.4, 0.68),
    "Building engine from subgraph": (0.68, 0.8),
}
REPORT_SECONDS: Final = 1.0
GRACE_SECONDS: Final = 10.0  # that a build gets to stop by itself once it is told to


@dataclass(frozen=True, slots=True)
class Request:
    """One engine to build.

    Attributes:
        source: the ONNX file; its weights lie beside it.
        target: where to write the engine.
        inputs: that the graph must have.
        outputs: that the graph must have.
        profiles: for each, the shapes of every input with a dynamic side.
        optimization_level: None for TensorRT's default.
        timing_cache: file, or None for no cache.
        is_timing_cache_pinned: the file is read and left as it is; what it does not hold is an error.
        is_version_compatible: build for TensorRT's lean runtime and newer releases.
        compute_capabilities: to build for, as in "8.9"; none for the library's default.
        level: lowest logging level that anybody reads.
    """

    source: str
    target: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[dict[str, Range], ...]
    optimization_level: int | None
    timing_cache: str | None
    is_timing_cache_pinned: bool
    is_version_compatible: bool
    compute_capabilities: tuple[str, ...]
    level: int


@dataclass(frozen=True, slots=True)
class Message:
    """What the building process says.

    Attributes:
        kind: `log` a line of TensorRT's log, `progress` now and then, and last `built` or `failed`.
        text: what was logged, or why it failed.
        level: of what was logged.
        fraction: how much of the build is done, never less than before.
        seconds: since the build began.
        peak_bytes: largest resident size so far.
    """

    kind: Literal["log", "progress", "built", "failed"]
    text: str = ""
    level: int = 0
    fraction: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0


class CannotBuildError(Exception):
    """The engine cannot be built; the text says why."""


Send: TypeAlias = Callable[[Message], None]


class LogRelay:
    """Sends what TensorRT logs, from whichever of its threads, and keeps what tells why a build failed.

    An IErrorRecorder would take the errors away from the log, so there is none.
    """

    def __init__(self, send: Send, level: int, stop: threading.Event) -> None:
        super().__init__()
        self.errors: list[str] = []
        self.misfits: list[str] = []
        self._send = send
        self._level = level
        self._stop = stop

    def log(self, severity: Any, text: str) -> None:
        """Take one line, as TensorRT's ILogger."""
        level = LEVELS[severity.name]
        if MISFIT in text:
            self.misfits.append(text)
            self._stop.set()  # the engine would be of no use
        elif level >= logging.ERROR:
            self.errors.append(text)
        if any(words in text for words in CHATTER):
            level = min(level, logging.DEBUG)
        if level >= self._level:
            self._send(Message("log", text, level))

    @property
    def reason(self) -> str:
        """The last errors."""
        errors = [text for text in self.errors if NO_DRIVER not in text] or self.errors
        return "; ".join(errors[-3:]) or "no reason given"


class PhaseMonitor:
    """Follows the phases of a build, as TensorRT's IProgressMonitor, and stops it.

    It trusts no order of calls: an exception in one of them would end the process.
    """

    def __init__(self, stop: threading.Event) -> None:
        super().__init__()
        self.fraction = 0.0
        self._stop = stop
        self._num_steps: dict[str, int] = {}

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Take note that a phase begins."""
        self._num_steps[phase_name] = num_steps

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Tell whether to go on."""
        self._reach(phase_name, min(1.0, (step + 1) / self._num_steps.get(phase_name, 1)))
        return not self._stop.is_set()

    def phase_finish(self, phase_name: str) -> None:
        """Take note that a phase is over."""
        self._reach(phase_name, 1.0)

    def _reach(self, phase: str, part: float) -> None:
        if phase in SHARES:
            begin, end = SHARES[phase]
            self.fraction = max(self.fraction, begin + (end - begin) * part)


def build(trt: Any, request: Request, send: Send, stop: threading.Event) -> None:
    """Build an engine and write it.

    Args:
        trt: the library.
        request: what to build.
        send: gets log and progress.
        stop: ends the build when it is set.

    Raises:
        CannotBuildError: the library refuses.
    """
    log = _with_base(LogRelay, trt.ILogger)(send, request.level, stop)
    monitor = _with_base(PhaseMonitor, trt.IProgressMonitor)(stop)
    started = time.monotonic()
    with _reporting(send, monitor, started):
        try:
            builder = trt.Builder(log)
        except TypeError as error:  # pybind's way of saying that there is none
            raise CannotBuildError(f"there is no builder: {log.reason}") from error
        network, _parser = _parsed(trt, builder, request, log)
        config = _configured(trt, builder, request, log)
        config.progress_monitor = monitor
        engine = builder.build_serialized_network(network, config)
        if log.misfits:
            raise CannotBuildError(f"its sizes do not fit the network: {'; '.join(log.misfits)}")
        if engine is None:
            raise CannotBuildError(log.reason)
        _write(engine, request.target)
        if request.timing_cache is not None and not request.is_timing_cache_pinned:
            _write_timing_cache(config, Path(request.timing_cache))
    send(Message("built", fraction=1.0, seconds=time.monotonic() - started, peak_bytes=_peak_bytes()))


def _with_base(kind: type, base: Any) -> Any:
    """Return `kind` over a base class that is known only once the library is loaded."""
    return type(kind.__name__, (kind, base), {})


def _parsed(trt: Any, builder: Any, request: Request, log: Any) -> tuple[Any, Any]:
    """Return the network, and the parser, which holds the weights that the network points to."""
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):  # needed up to 10.x, without effect after it
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request.source):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        told = [f"node {e.node()} ({e.node_name() or '?'}, {e.node_operator() or '?'}): {e.desc()}" for e in errors]
        raise CannotBuildError(f"the parser refuses {request.source}: {'; '.join(told) or log.reason}")
    for what, specs, tensors in (  # a file that is no ONNX may well parse, as a network of nothing
        ("inputs", request.inputs, [network.get_input(i) for i in range(network.num_inputs)]),
        ("outputs", request.outputs, [network.get_output(i) for i in range(network.num_outputs)]),
    ):
        described = [f"{spec.name} {spec.dtype}" for spec in specs]
        found = [f"{tensor.name} {DTYPES.get(tensor.dtype.name, tensor.dtype.name)}" for tensor in tensors]
        if described != found:
            raise CannotBuildError(
                f"{request.source} should have the {what} {', '.join(described)}, but has "
                f"{', '.join(found) or 'none'}. Export again with `hemiola export`"
            )
    return network, parser


def _configured(trt: Any, builder: Any, request: Request, log: Any) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names of layers, for inspector and profilers
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 parts are float32 because they need to be
    config.max_aux_streams = 0  # so that one stream holds the whole launch, and a CUDA graph captures it
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX: no launch allocates, so it can be captured
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if request.is_version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if request.optimization_level is not None:
        config.builder_optimization_level = request.optimization_level
    for ranges in request.profiles:
        _add_profile(builder, config, ranges, log)
    if request.compute_capabilities:
        _set_capabilities(trt, config, request.compute_capabilities)
    if request.timing_cache is not None:
        _set_timing_cache(trt, config, Path(request.timing_cache), log, is_pinned=request.is_timing_cache_pinned)
    return config


def _add_profile(builder: Any, config: Any, ranges: dict[str, Range], log: Any) -> None:
    profile = builder.create_optimization_profile()
    try:
        for name, shapes in ranges.items():
            profile.set_shape(name, *shapes)
    except (ValueError, RuntimeError) as error:
        raise CannotBuildError(f"it refuses the shapes {shapes} of the input {name}: {error}") from error
    if not profile or config.add_optimization_profile(profile) < 0:
        raise CannotBuildError(f"it refuses the shapes {ranges}: {log.reason}")


def _set_capabilities(trt: Any, config: Any, wanted: tuple[str, ...]) -> None:
    members = trt.ComputeCapability.__members__
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        member = members.get(f"SM{capability.replace('.', '')}")
        if member is None or not config.set_compute_capability(member, index):
            known = [f"{name[2:-1]}.{name[-1]}" for name in members if name.startswith("SM")]
            raise CannotBuildError(
                f"{trt.__name__} {trt.__version__} does not build for compute capability {capability}, "
                f"only for {', '.join(known)}"
            )


def _set_timing_cache(trt: Any, config: Any, path: Path, log: Any, *, is_pinned: bool) -> None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        raise CannotBuildError(f"it refuses the timing cache {path}: {log.reason}. Delete the file")
    if is_pinned:
        config.set_flag(trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)


def _write(engine: Any, target: str) -> None:
    try:
        with open(target, "wb") as file:  # noqa: PTH123, the name came as text
            file.write(engine)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CannotBuildError(f"it cannot be written to {target}: {error.strerror}") from error


def _write_timing_cache(config: Any, path: Path) -> None:
    try:
        write_bytes(bytes(config.get_timing_cache().serialize()), path)
    except OSError as error:
        raise CannotBuildError(f"the timing cache {path} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def _reporting(send: Send, monitor: PhaseMonitor, started: float) -> Iterator[None]:
    """Report progress every second; TensorRT lets other threads run while it builds."""
    done = threading.Event()

    def report() -> None:
        while not done.wait(REPORT_SECONDS):
            seconds = time.monotonic() - started
            send(Message("progress", fraction=monitor.fraction, seconds=seconds, peak_bytes=_peak_bytes()))

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()


def _peak_bytes() -> int:
    """Return the largest resident size so far; `getrusage` would count what the parent had when it forked."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


def _sender(stdout: TextIO, stop: threading.Event) -> Send:
    lock = threading.Lock()

    def send(message: Message) -> None:
        with lock:
            try:
                stdout.write(json.dumps(encode(message)) + "\n")
                stdout.flush()
            except OSError:  # nobody reads any more
                stop.set()

    return send


def _stop_at_end_of_input(stop: threading.Event) -> None:
    """Stop when the parent closes our stdin, or dies; at the next step of the build, or before long without one."""
    os.read(0, 1)
    stop.set()
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def main() -> None:
    """Read a request, build, and leave without running the library's destructors, which have nothing to add."""
    stop = threading.Event()
    send = _sender(os.fdopen(os.dup(1), "w", encoding="utf-8"), stop)
    os.dup2(2, 1)  # what libraries print is no message
    request = parse(Request, sys.stdin.buffer.readline(), "request")
    threading.Thread(target=_stop_at_end_of_input, args=(stop,), daemon=True).start()
    status = 0
    try:
        try:
            trt = importlib.import_module(sys.argv[1])
        except ImportError as error:
            raise CannotBuildError(f"{sys.argv[1]} is installed but cannot be imported: {error}") from error
        build(trt, request, send, stop)
    except CannotBuildError as error:
        send(Message("failed", str(error)))
        status = 1
    os._exit(status)


if __name__ == "__main__":
    main()
