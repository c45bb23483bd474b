"""Model files: open them (`open_model`), say what they are (`inspect_model`), write them (`save_folder`)."""

from mezzotint.weights.checkpoint import Parts, Report, inspect_model, open_model
from mezzotint.weights.save import save_folder

__all__ = ["Parts", "Report", "inspect_model", "open_model", "save_folder"]
