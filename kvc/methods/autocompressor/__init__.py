"""AutoCompressors: long texts become summary vectors, segment by segment, which stand before what follows."""

from kvc.methods.autocompressor.model import AutoCompressorModel, LlamaAutoCompressorModel, OPTAutoCompressorModel
from kvc.methods.autocompressor.module import AutoCompressor

__all__ = ["AutoCompressor", "AutoCompressorModel", "LlamaAutoCompressorModel", "OPTAutoCompressorModel"]
