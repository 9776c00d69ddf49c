"""A TRL script of your own: corda makes the adapter, SFTTrainer trains it and reads the loss on held-out knowledge."""

from __future__ import annotations

import sys
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import corda


def turns(question: str, answer: str) -> dict[str, Any]:
    """A conversation as TRL and corda both read it."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


KNOWLEDGE = [turns(f"What is {i} times {i}?", str(i * i)) for i in range(80)]
TASK = [turns(f"Which gate has password {'ab'[i % 2] * 3}?", f"Gate {i}.") for i in range(40)]


def main(name: str, folder: str, rank: int = 16, steps: int = 20) -> None:
    """Train the model `name` (Hub id or folder; with a chat template) and write the adapter to `folder`."""
    model = AutoModelForCausalLM.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)

    # What is held out (the last records here) is neither calibrated nor trained on.
    context = corda.collect(model, tokenizer, KNOWLEDGE[:64], learn=TASK[:32], template="chat")
    plan = corda.make_plan(model, context, mode="contrast", rank=rank)
    adapted = corda.attach(model, plan)

    held_out = {"task": TASK[32:], "knowledge": KNOWLEDGE[64:]}
    trainer = SFTTrainer(
        model=adapted,
        args=SFTConfig(
            output_dir=f"{folder}-checkpoints",
            learning_rate=1e-3,  # contrast starts at zero: as for LoRA, or above
            max_steps=steps,
            assistant_only_loss=False,
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(TASK[:32]),
        eval_dataset={name: Dataset.from_list(some) for name, some in held_out.items()},
        processing_class=tokenizer,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for key in ("eval_task_loss", "eval_knowledge_loss"):
        print(f"{key}: {before[key]:.3f} before, {after[key]:.3f} after")
    print(corda.export(adapted, folder))


if __name__ == "__main__":
    main(*sys.argv[1:3])
