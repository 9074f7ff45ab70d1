"""From a checkpoint to a Hugging Face folder that is proven to be the same model and the same tokenizer."""

from nsa.exporting.folder import ExportError, export, load_decoder, load_imported

__all__ = ["ExportError", "export", "load_decoder", "load_imported"]
