"""Every error that mezzotint raises on purpose: a sentence saying what was wrong, where, and what would be right."""


class MezzotintError(Exception):
    """The family. `str(error)` is one sentence for a person; the command line prints it and exits with 2."""


class RequestError(MezzotintError):
    """A field of a Request is wrong, or does not fit the model."""


class CheckpointError(MezzotintError):
    """A model file or folder cannot be used: missing, damaged, foreign, or unsafe."""


class BudgetError(MezzotintError):
    """The work does not fit the memory that it was given."""


class MissingExtraError(MezzotintError):
    """A feature needs a package that is not installed; the sentence says which extra brings it."""


class WriteError(MezzotintError):
    """A finished picture cannot be written, as on a full disk: no fault of the request's. The exit code is 1."""


class TrainingError(MezzotintError):
    """A run of training cannot go on, as when its loss is no number. The exit code is 1."""
