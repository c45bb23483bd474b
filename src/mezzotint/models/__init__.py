"""The networks and the tokenizer: CLIP, UNet, VAE, and how they run (attention backends, offloading, tiles)."""
