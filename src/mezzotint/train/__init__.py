"""Training from nothing: the VAE, then the text encoder and UNet together. The loop is exact across a kill."""
