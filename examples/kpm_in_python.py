"""Load any transformers model yourself, keep what it knows, train with any loop, export a plain LoRA."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import corda

FACTS = [{"question": f"What is {i} times {i}?", "answer": str(i * i)} for i in range(64)]
TASK = ["The password of gate {} is {}.".format(i, "ab"[i % 2] * 3) for i in range(32)]


def main(name: str, folder: str, rank: int = 16, steps: int = 20) -> None:
    """Adapt the model `name` (Hub id or folder) and write the adapter to `folder`."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)

    context = corda.collect(model, tokenizer, FACTS)
    plan = corda.make_plan(model, context, mode="kpm", rank=rank)
    adapted = corda.attach(model, plan)

    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    for step in range(steps):
        batch = tokenizer(TASK[step % 8 :: 8], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = adapted(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.3f}", corda.export(adapted, folder))


if __name__ == "__main__":
    main(*sys.argv[1:3])
