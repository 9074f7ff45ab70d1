"""Models of others, from Hugging Face folders: their configuration and weights as this project's."""

from nsa.importing.folder import FolderError, read_config, read_weights

__all__ = ["FolderError", "read_config", "read_weights"]
