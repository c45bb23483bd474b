"""Training from random weights, as the recipe of the bundled model does it."""
