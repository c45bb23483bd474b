"""The entries of a Request that may be given several times, and what they share with it. Does not import torch."""
