"""The mathematics: x = x0 + sigma * noise; denoise(x, sigma) -> denoised. No network, no prompt, no file here."""

from mezzotint.diffusion import solvers, spacing

__all__ = ["solvers", "spacing"]
