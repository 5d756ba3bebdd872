"""Exactness of the plain language model: padding, gradient checkpointing, train mode."""

from pathlib import Path
from typing import Any

import cases
import pytest
import torch

from kvc.core.backbone import Backbone, Lora, decoder
from kvc.methods.lm import LanguageModel


def model_of(tiny_folder: Path, dropout: float = 0.0, checkpointing: bool = False) -> LanguageModel:
    """A LoRA model whose adapters are not zero."""
    lora = Lora(r=2, dropout=dropout)
    model = LanguageModel(Backbone(str(tiny_folder), lora=lora, gradient_checkpointing=checkpointing), train="lora")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return model


def batch_of(lengths: list[int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 1200, (length,), generator=generator) for length in lengths]
    batch = cases.pad_rows(list(enumerate(rows)))
    batch["weights"] = torch.rand(batch["labels"].shape, generator=generator) * (batch["labels"] >= 0)
    return batch


def row_of(batch: dict[str, torch.Tensor], row: int, length: int) -> dict[str, torch.Tensor]:
    return {key: value[row : row + 1, :length] for key, value in batch.items() if key != "id"}


@pytest.mark.parametrize("weighted", [True, False])
def test_padded_batch_is_the_sum_of_its_rows(tiny_folder: Path, weighted: bool) -> None:
    model, lengths = model_of(tiny_folder), [3, 17, 9, 24]
    batch = batch_of(lengths)
    if not weighted:
        del batch["weights"]
    together = model.step(batch)
    alone = [model.step(row_of(batch, row, length)) for row, length in enumerate(lengths)]
    assert float(together.loss_sum) == pytest.approx(sum(float(o.loss_sum) for o in alone), abs=1e-4, rel=1e-6)
    assert float(together.num_tokens) == pytest.approx(sum(float(o.num_tokens) for o in alone), rel=1e-6)
    if not weighted:
        assert float(together.num_tokens) == sum(length - 1 for length in lengths)
    together.loss_sum.backward()
    gradient = gradients(model)
    model.zero_grad()
    torch.stack([o.loss_sum for o in alone]).sum().backward()
    largest = max(float(value.abs().max()) for value in gradient.values())
    assert cases.distance(gradient, gradients(model)) <= 2e-6 * largest


def test_loss_is_that_of_transformers(tiny_folder: Path) -> None:
    model = model_of(tiny_folder)
    batch = batch_of([12, 12])
    ours = model.step({key: batch[key] for key in ("input_ids", "labels")})
    theirs = model.backbone(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    assert float(ours.loss_sum / ours.num_tokens) == pytest.approx(float(theirs), abs=1e-5)


def gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_gradient(
    tiny_folder: Path, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of([20, 11])
    runs: list[int] = []
    found: list[dict[str, torch.Tensor]] = []
    for checkpointing in (False, True):
        model = model_of(tiny_folder, dropout, checkpointing)
        assert model.training
        assert all(layer.training for layer in decoder(model.backbone).layers)  # type: ignore[union-attr]
        calls: list[None] = []
        layer: Any = decoder(model.backbone).layers[0]  # type: ignore[index]
        layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        torch.manual_seed(5)
        model.step(batch).loss_sum.backward()
        runs.append(len(calls))
        found.append(gradients(model))
    assert runs == [1, 2], "checkpointing runs the layer again in the backward pass, and only then"
    assert found[0]
    assert cases.distance(*found) <= 1e-6


def test_dropout_is_on_in_train_mode_and_off_in_eval_mode(tiny_folder: Path) -> None:
    model, batch = model_of(tiny_folder, 0.3), batch_of([20, 11])
    losses = [float(model.step(batch).loss_sum) for _ in range(2)]
    assert losses[0] != losses[1]
    model.eval()
    losses = [float(model.step(batch).loss_sum) for _ in range(2)]
    assert losses[0] == losses[1]


def test_only_adapters_are_trained_and_saved(tiny_folder: Path) -> None:
    model = model_of(tiny_folder)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    assert set(model.trained_state()) == set(trained)
    assert all(value.dtype == torch.float32 for value in model.trained_state().values())


def test_lora_and_train_must_agree(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.train"):
        LanguageModel(Backbone(str(tiny_folder)), train="lora")
    with pytest.raises(ValueError, match=r"model\.train"):
        LanguageModel(Backbone(str(tiny_folder), lora=Lora()), train="all")
