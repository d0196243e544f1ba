"""End-to-end scene graph generation for the Hugging Face stack."""

from ._version import __version__


__all__ = ["__version__"]
