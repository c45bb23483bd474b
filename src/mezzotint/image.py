"""Read and write pictures with their records."""

from mezzotint.images.io import from_pil, read_metadata, read_picture, save, save_png, to_pil

__all__ = ["from_pil", "read_metadata", "read_picture", "save", "save_png", "to_pil"]
