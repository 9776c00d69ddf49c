"""Training: a thin call of a trainer, TRL's SFTTrainer unless told otherwise, on records that are tokens already."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.integrations import get_available_reporting_integrations

from corda import checkpoints
from corda.data.batches import IGNORED, Encoded
from corda.data.images import training_rows
from corda.distributed import world
from corda.drift import DriftMeter, Watch
from corda.errors import DataError, RecipeError
from corda.forms import INITIAL, TRAINED
from corda.progress import Progress, silent
from corda.recipe import TrainingOptions
from corda.sharding import device_of

_METER = {"drift_meter", "drift_steps", "max_drift", "drift_weight"}
_OURS = {"save_steps", "save_total_limit", "resume_from_checkpoint", "disable_tqdm", "bf16", "decay_to_init", *_METER}
_OURS |= {"eval_steps", "eval_strategy", "gradient_checkpointing"}
EVAL_SHARE = 0.05  # of all steps, between two readings of the loss on validation records

# Of a model, the records it learns from, the folder for checkpoints, and validation records.
TrainerOf = Callable[[PeftModel, Sequence[Encoded], Path, Sequence[Encoded]], Trainer]


@dataclass(frozen=True)
class Curve:
    """What training logged.

    Attributes:
        loss: Mean loss per response token (of a classifier: per record) of each logged step, in nats.
        step: The optimiser steps they belong to.
        learning_rate: At those steps.
        seconds: Wall-clock time of the training loop.
        drift_step: The optimiser steps that the drift meter was read after.
        drift: What it read, see `drift.Reading`: the root mean square over layers.
        drift_total: The total.
        drift_held_out: `drift` on knowledge that was not calibrated on; empty where there is none.
        stopped: The step at which the drift passed its limit; None where training went on to its end.
        eval_step: The optimiser steps after which the loss on validation records was read.
        eval_loss: What it was, as the trainer averages it over its batches of evaluation, in nats.
    """

    loss: tuple[float, ...]
    step: tuple[int, ...]
    learning_rate: tuple[float, ...]
    seconds: float
    drift_step: tuple[int, ...] = ()
    drift: tuple[float, ...] = ()
    drift_total: tuple[float, ...] = ()
    drift_held_out: tuple[float, ...] = ()
    stopped: int | None = None
    eval_step: tuple[int, ...] = ()
    eval_loss: tuple[float, ...] = ()


def train(
    model: PeftModel,
    tokenizer: Any,
    encoded: Sequence[Encoded],
    options: TrainingOptions,
    *,
    folder: Path,
    fingerprint: str,
    seed: int = 0,
    progress: Progress = silent,
    meter: DriftMeter | None = None,
    trainer_of: TrainerOf | None = None,
    validation: Sequence[Encoded] = (),
) -> Curve:
    """Train the model's adapter in place; by default on the loss of response tokens.

    Args:
        model: From `attach`.
        tokenizer: Its tokenizer; for a model of images and text, its processor.
        encoded: Training records.
        options: TRL's fields.
        folder: For checkpoints and logs; a checkpoint there with the same fingerprint is continued.
        fingerprint: Of everything the training depends on.
        seed: Of the data order.
        progress: Shows how far it is.
        meter: Read during training, logged, and held to `max_drift`; None for no meter.
        trainer_of: Makes the trainer of a model, its records, the folder and validation; default: `text_trainer`.
        validation: Records whose loss is read during training; none: it is not.

    Raises:
        DataError: no record has a response token, or none of those for validation.
    """
    learnt, held = ([one for one in some if one.learnable] for some in (encoded, validation))
    if not learnt:
        raise DataError("no training record has a response token", where="data.learn", fix="raise data.max_length")
    if validation and not held:
        raise DataError(
            "no validation record has a response token", where="data.validation", fix="raise data.max_length"
        )
    processes = world()
    limit, found = (options.model_extra or {}).get("save_total_limit"), None
    if processes.first and options.resume_from_checkpoint:
        found = checkpoints.last(folder, fingerprint, limit)
    elif processes.first:
        checkpoints.anew(folder, fingerprint)
    resume = processes.tell(found)
    if resume is not None and (finished := checkpoints.finished(Path(resume))) is not None:
        wanted = (options.model_extra or {}).get("load_best_model_at_end")
        model.load_adapter(str(checkpoints.best(Path(resume))) if wanted else resume, TRAINED)
        model.eval()
        return _curve(finished, 0.0)
    make = trainer_of or functools.partial(text_trainer, tokenizer=tokenizer, options=options, seed=seed)
    trainer = make(model, learnt, folder, held)
    if options.decay_to_init:
        trainer.add_callback(DecayToInit(model, options.decay_to_init))
    watch = Watch(meter, options, functools.partial(Trainer.log, trainer)) if meter is not None else None
    if watch is not None:
        trainer.add_callback(watch)
    trainer.add_callback(checkpoints.Sealing(limit))
    trainer.remove_callback(PrinterCallback)  # prints every log line where there is no progress bar
    steps = _Steps(progress)
    trainer.add_callback(steps)
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        steps.close()
        for wrapper in ("forward", "_original_forward"):  # accelerate leaves its autocast on the model
            vars(model).pop(wrapper, None)
    seconds = time.perf_counter() - start
    model.eval()
    return _curve(trainer.state.log_history, seconds, watch.stopped if watch else None)


def text_trainer(
    model: PeftModel,
    learnt: Sequence[Encoded],
    folder: Path,
    validation: Sequence[Encoded] = (),
    *,
    tokenizer: Any,
    options: TrainingOptions,
    seed: int,
) -> Trainer:
    """TRL's trainer on the loss of response tokens.

    Args:
        model: From `attach`.
        learnt: Records with response tokens.
        folder: For checkpoints and logs.
        validation: Records whose loss is read during training.
        tokenizer: Its tokenizer; for a model of images and text, its processor.
        options: TRL's fields.
        seed: Of the data order.
    """
    from trl import SFTTrainer

    arguments = trainer_arguments(options, folder, seed, device_of(model), validated=bool(validation))
    shown = any(one.visual is not None and one.visual.images for one in (*learnt, *validation))
    with _undisturbed(model):
        return SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=_dataset(learnt, arguments, shown=shown),
            eval_dataset=_dataset(validation, arguments, shown=shown) if validation else None,
            processing_class=tokenizer,
        )


def _curve(log: Sequence[dict[str, Any]], seconds: float, stopped: int | None = None) -> Curve:
    logged = [entry for entry in log if "loss" in entry]
    read = [entry for entry in log if "drift" in entry]
    validated = [entry for entry in log if "eval_loss" in entry]
    return Curve(
        tuple(float(e["loss"]) for e in logged),
        tuple(int(e["step"]) for e in logged),
        tuple(float(e["learning_rate"]) for e in logged),
        seconds,
        tuple(int(e["step"]) for e in read),
        tuple(float(e["drift"]) for e in read),
        tuple(float(e["drift_total"]) for e in read),
        tuple(float(e["drift_held_out"]) for e in read if "drift_held_out" in e),
        stopped,
        tuple(int(e["step"]) for e in validated),
        tuple(float(e["eval_loss"]) for e in validated),
    )


def _dataset(learnt: Sequence[Encoded], arguments: Any, *, shown: bool) -> Any:
    """What TRL trains on: tokens with labels, or where images are shown texts that it processes with them itself."""
    from datasets import Dataset, Features, Image, List, Value

    if shown:
        visuals = [one.visual for one in learnt if one.visual is not None]
        arguments.completion_only_loss, arguments.max_length = True, visuals[0].max_length
        features = Features({"prompt": Value("string"), "completion": Value("string"), "images": List(Image())})
        return Dataset.from_list(training_rows(visuals), features=features)
    return Dataset.from_list(
        [
            {
                "input_ids": list(one.ids),
                "labels": [t if r else IGNORED for t, r in zip(one.ids, one.response, strict=True)],
            }
            for one in learnt
        ]
    )


@contextmanager
def _undisturbed(model: PeftModel) -> Iterator[None]:
    """Undo the trainer's rounding of adapters on 4-bit bases to bf16: B A would no longer cancel B0 A0."""
    kept = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, data in kept:
        parameter.data = data


def trainer_arguments(
    options: TrainingOptions, folder: Path, seed: int, device: torch.device, *, validated: bool
) -> Any:
    """TRL's SFTConfig for the options.

    Args:
        options: TRL's fields and corda's.
        folder: For checkpoints.
        seed: Of data order and sampling.
        device: To train on.
        validated: Whether there are validation records.

    Raises:
        RecipeError: TRL refuses them.
    """
    from trl import SFTConfig

    return arguments_of(SFTConfig, options, folder, seed, device, validated=validated, max_length=None)


def arguments_of(
    kind: Any,
    options: TrainingOptions,
    folder: Path,
    seed: int,
    device: torch.device,
    *,
    validated: bool,
    **own: Any,
) -> Any:
    """A trainer's arguments for the options.

    Args:
        kind: Their class: transformers' TrainingArguments or one of its children.
        options: Its fields and corda's.
        folder: For checkpoints.
        seed: Of data order and sampling.
        device: To train on.
        validated: Whether there are validation records; their loss is then read every `eval_steps`.
        own: Fields that no recipe sets.

    Raises:
        RecipeError: the class refuses them.
    """
    extra = options.model_extra or {}
    passed = {k: v for k, v in options.model_dump().items() if k not in _OURS}
    if validated:  # the trainer's own default, 8, may not fit where training is at 1
        passed.setdefault("per_device_eval_batch_size", options.per_device_train_batch_size)
    try:
        with _on(device):
            arguments = kind(
                output_dir=str(folder),
                seed=seed,
                data_seed=seed,
                use_cpu=device.type == "cpu",
                activation_checkpointing=options.gradient_checkpointing,  # its name from transformers 5.20 on
                bf16=_use_bf16(options, device),
                save_strategy="steps" if options.save_steps else "no",
                save_steps=options.save_steps or 500,
                eval_strategy=(extra.get("eval_strategy", "steps") or "no") if validated else "no",
                eval_steps=options.eval_steps or EVAL_SHARE,
                disable_tqdm=True if options.disable_tqdm is None else options.disable_tqdm,
                **passed,
                **own,
            )
            if _single_gpu(device):
                assert arguments.device is not None  # asking sets both
                arguments.__dict__["_setup_devices"], arguments._n_gpu = device, 1
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(
            "the trainer refuses these options", where="training", got=str(error).splitlines()[0]
        ) from None
    if missing := sorted(set(arguments.report_to) - set(get_available_reporting_integrations())):
        raise RecipeError(
            "the package to report to is not installed",
            where="training.report_to",
            got=", ".join(missing),
            fix=f"pip install {' '.join(missing)}, or report_to: none",
        )
    return arguments


def _single_gpu(device: torch.device) -> bool:
    return device.type == "cuda" and world().size == 1


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Where accelerate looks for the device: transformers would take the first GPU and copy the model to all."""
    name, before = "ACCELERATE_TORCH_DEVICE", torch.cuda.current_device() if _single_gpu(device) else None
    if before is None:
        yield
        return
    given = os.environ.get(name)
    os.environ[name] = str(device)
    try:
        yield
    finally:
        torch.cuda.set_device(before)
        os.environ.pop(name) if given is None else os.environ.update({name: given})


class _Steps(TrainerCallback):  # type: ignore[misc]
    """The trainer's steps as items that a progress display consumes."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.items: Iterator[int] = iter(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called once the number of steps is known; a resumed training has done some."""
        left = state.max_steps - state.global_step
        self.items = iter(self.progress(range(left), "train", left))
        next(self.items, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after each optimiser step."""
        next(self.items, None)

    def close(self) -> None:
        """End the display, however the training ended."""
        if isinstance(self.items, Generator):
            self.items.close()


class DecayToInit(TrainerCallback):  # type: ignore[misc]
    """After each optimiser step, A and B move by learning rate x strength of the way back to A0 and B0.

    Ordinary weight decay would pull an adapter that does not start at zero towards zero, and so take components of
    the base away.
    """

    def __init__(self, model: PeftModel, strength: float) -> None:
        self.model, self.strength = model, strength
        self._pair()
        if not self.pairs or any(one is two for one, two in self.pairs):
            raise RecipeError(
                "decay_to_init needs an adapter with initial factors",
                where="training.decay_to_init",
                fix="use mode kpm, ipm or dual, or weight_decay where B starts at zero",
            )

    def _pair(self) -> None:
        parameters = dict(self.model.named_parameters())
        self.pairs = [
            (trained, parameters[initial].detach())
            for name, trained in parameters.items()
            if trained.requires_grad and (initial := name.replace(f".{TRAINED}.", f".{INITIAL}.")) in parameters
        ]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer once the model is as it is trained: sharding puts new parameters in place."""
        self._pair()

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer between the optimiser's step and the zeroing of gradients."""
        weight = self.strength * kwargs["optimizer"].param_groups[0]["lr"]
        for trained, initial in self.pairs:
            trained.lerp_(initial.to(trained.dtype), weight)


def _use_bf16(options: TrainingOptions, device: torch.device) -> bool:
    if options.bf16 is not None:
        return options.bf16
    if (options.model_extra or {}).get("fp16"):
        return False
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
