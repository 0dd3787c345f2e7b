"""The command line: `hemiola search | export | build | measure | run | bench | report | verify | inspect | doctor`.

Exit codes: 0 done; 1 a fault, told in one message without a traceback unless --verbose; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import metadata
from types import FrameType
from typing import Final, NoReturn

from hemiola_runtime.errors import HemiolaError

COMMANDS: Final = ("search", "export", "build", "measure", "run", "bench", "report", "verify", "inspect", "doctor")
EXTRA_OF: Final = {  # what to install when an import fails
    "onnxruntime": "cpu",
    "PIL": "cpu",
    "tqdm": "cpu",
    "tokenizers": "text",
    "ray": "ray",
}

logger = logging.getLogger("hemiola")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO if options.log else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    command = importlib.import_module(f"hemiola.commands.{options.command}")
    try:
        with _termination_as_interrupt():
            code: int = command.run(options)
            return code
    except HemiolaError as error:
        return _fault(str(error), options.verbose)
    except KeyboardInterrupt as interrupt:
        return _fault(str(interrupt) or "interrupted; what was there before is unchanged", options.verbose)
    except OSError as error:
        return _fault(_in_words(error), options.verbose)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = EXTRA_OF.get(package, "search")
        return _fault(
            f"`hemiola {options.command}` needs {package}, which is not installed. "
            f"Install it with: pip install 'hemiola[{extra}]'",
            options.verbose,
        )


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names defaults where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hemiola", description="Searched feature caching for Diffusion Transformers, deployed as compiled engines."
    )
    parser.add_argument("--version", action="version", version=f"hemiola {metadata.version('hemiola')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = importlib.import_module(f"hemiola.commands.{name}")
        summary = (command.__doc__ or "").splitlines()[0]
        subparser = subparsers.add_parser(
            name,
            help=summary.rstrip("."),
            description=command.__doc__,
            formatter_class=_HelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.add_argument("--verbose", action="store_true", help="log everything, and show tracebacks of faults")
        subparser.add_argument("--log", action="store_true", help="log every artifact that is written")
    return parser


def _fault(message: str, is_verbose: bool) -> int:
    if is_verbose:
        logger.exception("%s", message)
    else:
        sys.stderr.write(f"hemiola: {message}\n")
    return 1


def _in_words(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full{where}: {error.strerror}. Nothing was replaced; free some space and run it again"
    return f"{error.strerror or error}{where}"


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Take a request to terminate like Ctrl-C; only the main thread is told of either."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
