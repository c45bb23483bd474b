"""Prompts as the UNet sees them: tokens in chunks (`chunks`), encoded by the text encoders (`encode`)."""
