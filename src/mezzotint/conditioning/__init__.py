"""From a parsed prompt to the conditions of the UNet: chunks of tokens, text encoders, weights."""
