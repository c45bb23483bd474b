"""The exceptions of mezzotint. Each message is a sentence that says what is wrong, where, and what would be right."""


class MezzotintError(Exception):
    """The base class. The command line prints the message and exits with code 2, unless a subclass says otherwise."""


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
