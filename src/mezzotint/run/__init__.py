"""One run: resolve its request, encode its prompts, prepare its first latents, execute it, and guard it from NaN."""
