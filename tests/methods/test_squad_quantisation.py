"""Slots as codes: how far off, how many bytes, and what training sees of it."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch

from kvc.errors import UserError
from kvc.methods.squad import FixedSlots, Latent, MeanPool
from kvc.methods.squad.quantisation import Quantised, SlotCode

D = 128
CODES = [SlotCode(8), SlotCode(4), SlotCode(8, 32), SlotCode(4, 32)]


def slots(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(3)) * 0.01


@pytest.mark.parametrize("code", CODES)
def test_no_entry_is_further_off_than_half_a_step(code: SlotCode) -> None:
    values = slots(3, 5)
    coded = code.encode(values)
    back = code.decode(coded)
    step = coded.scale.float().repeat_interleave(D // code.groups(D), dim=-1)
    # A scale in fp16 is itself rounded, by which the largest entries may miss a little more.
    assert ((back - values).abs() <= step * 0.5 + values.abs() * 2**-10).all()
    assert coded.scale.dtype == torch.float16
    assert not torch.equal(back, values)


@pytest.mark.parametrize("code", CODES)
def test_bytes_are_those_of_the_tensors(code: SlotCode) -> None:
    coded = code.encode(slots(7))
    assert sum(tensor.nbytes for tensor in coded) == code.wire_bytes(7, D)


def test_bytes_of_a_large_model() -> None:
    assert SlotCode(8).wire_bytes(64, 4096) == 64 * (4096 + 2)
    assert SlotCode(4).wire_bytes(64, 4096) == 64 * (2048 + 2 * 64) == 136 * 1024


def test_codes_use_all_levels_and_keep_signs_and_zeros() -> None:
    values = torch.linspace(-1, 1, D)[None]
    assert SlotCode(8).encode(values).codes.aminmax() == (-127, 127)
    packed = SlotCode(4, D).encode(values).codes
    unpacked = torch.cat([packed & 15, packed >> 4], dim=-1).int() - 8
    assert unpacked.aminmax() == (-7, 7)
    for code in CODES:
        assert torch.equal(code.decode(code.encode(-values)), -code.decode(code.encode(values)))
        assert not code.decode(code.encode(torch.zeros(2, D))).any()
        assert not code.decode(code.encode(torch.full((2, D), 1e-12))).any()


def test_groups_of_their_own_scale_are_nearer() -> None:
    values = slots(4) * torch.tensor([1.0, 100.0]).repeat_interleave(D // 2)
    off = [
        (code.decode(code.encode(values)) - values)[:, : D // 2].abs().mean() for code in (SlotCode(8), SlotCode(8, 64))
    ]
    assert off[1] < off[0] / 10


def test_gradients_pass_straight_through() -> None:
    values = slots(2).requires_grad_(True)
    weights = torch.randn(2, D)
    code = SlotCode(4)
    found = code.straight_through(values)
    torch.testing.assert_close(found, code.decode(code.encode(values)))
    (found * weights).sum().backward()
    assert torch.equal(values.grad, weights)


def test_codes_are_seen_at_the_end_of_training_and_in_evaluations() -> None:
    compressor = Quantised(D, 1.0, partial(Latent, slots=4, dropout=0.0), SlotCode(4), share=0.25)
    states, mask = slots(2, 9), torch.ones(2, 9)
    plain = compressor.inner(states, mask, FixedSlots(4)).slots
    seen = []
    for progress in (0.0, 0.7, 0.75, 1.0):
        compressor.progress = progress
        seen.append(torch.equal(compressor(states, mask, FixedSlots(4)).slots, plain))
    assert seen == [True, True, False, False]
    compressor.progress = 0.0
    found = compressor.eval()(states, mask, FixedSlots(4))
    torch.testing.assert_close(found.slots, compressor.code.decode(compressor.code.encode(plain)))
    assert found.aux["wire_bytes"].tolist() == [compressor.code.wire_bytes(4, D)] * 2
    assert compressor.most == 4
    late = Quantised(D, 1.0, share=0).train()
    late.progress = 1.0
    assert not late.coding


def test_masked_slots_stay_zero() -> None:
    compressor = Quantised(D, 1.0, MeanPool).eval()
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    found = compressor(slots(2, 6), mask, FixedSlots(4, "cap"))
    assert not found.slots[~found.mask].any()
    assert found.aux["wire_bytes"].tolist() == [4 * (D + 2), 2 * (D + 2)]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"code\.group: slots of width 30 cannot be cut into groups of 8"):
        Quantised(30, 1.0, code=SlotCode(8, 8))
    with pytest.raises(UserError, match=r"code\.bits must be 8 or 4"):
        SlotCode(3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"compressor\.share must lie between"):
        Quantised(32, 1.0, share=1.5)


def test_the_method_tells_how_far_training_is(tiny_folder: Any) -> None:
    from kvc.core.backbone import Backbone
    from kvc.methods.squad import ContextCompressor

    made = ContextCompressor(Backbone(pretrained=str(tiny_folder)), Quantised)
    made._trainer = SimpleNamespace(global_step=30, max_steps=40, accumulate_grad_batches=1, optimizers=[])
    made.on_train_batch_start({}, 0)
    assert made.compressor.progress == 0.75


SQUAD = "kvc.methods.squad"


def test_compressors_within_compressors_are_understood_and_run(tiny_folder: Any, tmp_path: Any) -> None:
    """A hierarchy in codes under a sampled budget, from a configuration file to results."""
    maker = {"class_path": f"{SQUAD}.Latent", "init_args": {"slots": 32}}
    stage = {"class_path": f"{SQUAD}.Convolution", "init_args": {"slots": 128}}
    stack = {
        "class_path": f"{SQUAD}.hierarchy.Hierarchical",
        "init_args": {"stages": [stage], "ratios": [2.0], "last": maker},
    }
    budgets = [{"class_path": f"{SQUAD}.FixedRatio", "init_args": {"ratio": ratio}} for ratio in (4, 16)]
    quantised = {"compressor": stack, "code": {"bits": 4, "group": 16}, "share": 0.5}
    config = {
        "trainer": {**cases.TRAINER, "max_epochs": 1},
        "model": {
            "class_path": f"{SQUAD}.ContextCompressor",
            "init_args": {
                "backbone": {"pretrained": str(tiny_folder)},
                "compressor": {"class_path": f"{SQUAD}.quantisation.Quantised", "init_args": quantised},
                "train_budget": {"class_path": f"{SQUAD}.sampled.Sampled", "init_args": {"budgets": budgets}},
                "max_new_tokens": 3,
            },
        },
        "data": {
            "class_path": "kvc.data.squad.Squad",
            "init_args": {"counts": [12, 4, 4], "facts": [2, 6], "batch_size": 4},
        },
    }
    assert cases.fit(config, tmp_path / "run") == 0
    assert (tmp_path / "run" / "result.json").is_file()
