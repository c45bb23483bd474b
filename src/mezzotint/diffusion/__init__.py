"""The mathematics of sampling: schedules, spacings, predictions, guidance, noise and solvers.

The whole package uses one coordinate, `x = x0 + sigma * noise`, and one denoiser signature,
`denoise(x, sigma) -> denoised`. It knows nothing of networks, prompts or files.
"""

from mezzotint.diffusion import solvers, spacing

__all__ = ["solvers", "spacing"]
