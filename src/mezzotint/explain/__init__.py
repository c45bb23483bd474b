"""Cross-attention maps of a prompt's words (`maps`), and the HTML page that shows them (`page`)."""

from mezzotint.explain.maps import Explanation, Token, Word, explain

__all__ = ["Explanation", "Token", "Word", "explain"]
