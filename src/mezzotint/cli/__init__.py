"""The command line. Exit codes: 0 success, 2 the request was wrong, 130 Ctrl-C, 1 anything else.

Progress and remarks go to standard error, the result to standard output: one line, or one JSON object with --json. What
is printed goes through `show`, `say` and `print_json` (terminal.py), which escape control characters. Tracebacks are
shown only if MEZZOTINT_DEBUG is set. Slow imports (torch, pillow, rich) are made by the command that needs them, after
everything that can be checked without them.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
IMPORT = "<frozen importlib._bootstrap>"  # the file name of every import's frames


def main() -> None:
    """Run the command in sys.argv and exit with its code."""
    _open_closed_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # under nohup it is ignored, and stays so
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from mezzotint.cli.commands import run

        code = run()
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def _interrupt(_: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; during an import, which may print it, swallow it or crash, end the process at once."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORT:
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _open_closed_streams() -> None:
    """Open the standard streams that are closed, so that no file that is opened later takes their descriptors.

    Reading from standard input and writing to standard output then fail as on a closed descriptor (EBADF); what is
    written to standard error is lost.
    """
    for descriptor, name, flags in ((0, "stdin", os.O_WRONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            os.open(os.devnull, flags)  # takes the lowest free descriptor, which is this one
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", encoding="utf-8", closefd=False))
