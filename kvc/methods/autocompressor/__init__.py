"""AutoCompressors: long texts become summary vectors, segment by segment, which stand before what follows."""

from kvc.methods.autocompressor.model import AutoCompressorModel, LlamaAutoCompressorModel, OPTAutoCompressorModel

__all__ = ["AutoCompressorModel", "LlamaAutoCompressorModel", "OPTAutoCompressorModel"]
