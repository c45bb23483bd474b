"""Read, describe and write model files: `open_model`, `inspect_model`, `save_folder`."""

from mezzotint.weights.checkpoint import Parts, Report, inspect_model, open_model
from mezzotint.weights.save import save_folder

__all__ = ["Parts", "Report", "inspect_model", "open_model", "save_folder"]
