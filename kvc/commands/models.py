"""Options of commands that load a model themselves."""

import argparse
from typing import TYPE_CHECKING

from kvc.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvc.core.backbone import Backbone


def add_model_options(result: argparse.ArgumentParser, default: str | None, text: str) -> None:
    """Options that say which model, how and where.

    Args:
        result: Gets them.
        default: Model if none is named.
        text: Help of `--model`.
    """
    group = result.add_argument_group("model")
    group.add_argument("--model", default=default, metavar="MODEL", help=text)
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), help="precision (default: as it was saved)")
    group.add_argument(
        "--attn_implementation",
        choices=("sdpa", "eager"),
        default="sdpa",
        help="attention kernel of transformers (default: sdpa)",
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")


def load_model(options: argparse.Namespace) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, Backbone]":
    """Load what the options say.

    Returns:
        The model in eval mode on its device, its tokenizer, and what they were loaded from.

    Raises:
        UserError: If there is no such model or device.
    """
    import torch
    from transformers.utils import logging

    from kvc.core.backbone import Backbone

    logging.disable_progress_bar()
    backbone = Backbone(options.model, dtype=options.dtype or "auto", attn_implementation=options.attn_implementation)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    tokenizer = backbone.load_tokenizer()
    model = backbone.load().eval()
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {' '.join(str(error).split())[:100]}") from error
    return model, tokenizer, backbone
