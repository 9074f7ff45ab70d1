"""Models of others, from Hugging Face folders: their configuration and weights as this project's."""

from nsa.importing.folder import FolderError, WeightReader, read_config, read_sections, read_weights

__all__ = ["FolderError", "WeightReader", "read_config", "read_sections", "read_weights"]
