"""The exceptions of mezzotint. Each message is a sentence that says what is wrong, where, and what would be right."""

BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))  # they reorder what is shown
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}  # C0, DEL and C1
CONTROLS |= {code: f"\\u{code:04x}" for code in (*BIDI, 0x2028, 0x2029)}  # the last two are line ends


MAX_LINE = 4000  # characters; a path has at most 4096 bytes


def printable(text: str) -> str:
    r"""Return one line of text with its control characters as \xNN and its bidirectional ones as \uNNNN.

    What a file, its name or its metadata holds can then neither write to the terminal, nor pretend to be another line,
    nor fill the screen: of a line above 4,000 characters the middle is left out.
    """
    if len(text) > MAX_LINE:
        half = MAX_LINE // 2
        text = f"{text[:half]} ... ({len(text) - 2 * half:,} characters left out) ... {text[-half:]}"
    return text.translate(CONTROLS)


class MezzotintError(Exception):
    """The base class. The command line prints the message and exits with code 2, unless a subclass says otherwise."""

    def __str__(self) -> str:
        return printable(super().__str__())


class RequestError(MezzotintError):
    """A field of a Request is wrong, or does not fit the model."""


class CheckpointError(MezzotintError):
    """A model file or folder is missing, damaged, of an unknown kind, or unsafe to read."""


class BudgetError(MezzotintError):
    """The work does not fit into the memory that it was given."""


class MissingExtraError(MezzotintError):
    """A feature needs a package that is not installed. The message names the extra that installs it."""


class WriteError(MezzotintError):
    """A finished picture cannot be written, for example because the disk is full. The exit code is 1."""


class TrainingError(MezzotintError):
    """Training cannot continue, for example because the loss is not a number. The exit code is 1."""
