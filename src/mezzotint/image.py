"""Read and write pictures together with their records."""

from mezzotint.images.io import Picture, from_pil, read_metadata, read_picture, save, save_png, to_pil

__all__ = ["Picture", "from_pil", "read_metadata", "read_picture", "save", "save_png", "to_pil"]
