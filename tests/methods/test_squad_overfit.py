"""Every compressor can learn 32 questions by heart: nothing on the way from text to answer is cut."""

import time
from typing import Any

import pytest
import torch
from squad_tiny import MAKERS, batch, squad

from kvc.core.backbone import Backbone, Lora, tiny_folder
from kvc.methods.squad import ContextCompressor, FixedSlots, Source
from kvc.methods.squad.answers import texts

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_32_questions_are_learnt(name: str) -> None:
    backbone = Backbone(lora=Lora(r=16, alpha=32, dropout=0.0, targets=TARGETS))
    settings: dict[str, Any] = {} if name == "anchors" else {"source": Source(frozen=False)}
    made = ContextCompressor(backbone, MAKERS[name], FixedSlots(16, "cap"), max_new_tokens=6, **settings)
    data = squad(tiny_folder(), counts=(32, 4, 4), facts=(2, 4))
    rows = torch.arange(32)
    optimizer = torch.optim.AdamW(made.optim.build(made.groups(), 1)[0].param_groups, lr=4e-3)
    for group in optimizer.param_groups:
        group["lr"] = 4e-3
    everything = batch(data, rows.tolist(), "train")
    generator, found, start = torch.Generator().manual_seed(0), 0.0, time.time()
    for step in range(300):
        made.train()
        chosen = torch.randperm(32, generator=generator)[:16].tolist()
        output = made.step(batch(data, chosen, "train"))
        optimizer.zero_grad()
        (output.loss_sum / output.num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 19:
            said = texts(made.tokenizer, made.say(everything))
            found = sum(question.score(text).em for question, text in zip(everything["questions"], said)) / 32
            print(
                f"{name} step {step + 1}: loss {float(output.metrics['teacher_forcing']):.3f}, EM {found:.2f}, "
                f"{time.time() - start:.0f} s",
                flush=True,
            )
            if found > 0.9:
                break
    assert found > 0.9
