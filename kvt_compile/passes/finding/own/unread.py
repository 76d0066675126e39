"""A selection that was recognised as one, and why it is not (or cannot be proved to be) k-NN attention."""

from __future__ import annotations


class Unread(Exception):  # noqa: N818 - an outcome of the search, not an error
    """In one sentence: what is not k-NN attention about it."""
