"""A base model that cannot be built is one sentence."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from kvc.core.backbone import Backbone
from kvc.errors import UserError


def test_a_kernel_that_the_family_lacks(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gemma2", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"backbone.from_config: cannot build .* does not support an attention impl"):
        Backbone(pretrained=str(tmp_path), from_config=True).load()
