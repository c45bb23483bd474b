"""Cross-attention maps of a prompt's words (`maps`), and an image that shows them (`page`)."""

from mezzotint.explain.maps import Explanation, Token, Word, explain

__all__ = ["Explanation", "Token", "Word", "explain"]
