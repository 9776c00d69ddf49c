"""Ask the base and the trained model of a run the same things."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from corda import adapter, artifact, models
from corda.bases import Bases
from corda.data.batches import encode_segments, pad_id
from corda.data.formats import to_records
from corda.data.rendering import Segment
from corda.errors import ArtifactError, CordaError, DataError, ModelError
from corda.evaluation.generation import end_tokens, prompt
from corda.forms import TRAINED
from corda.inputs import Inputs
from corda.plan import plan as plans
from corda.processing import takes_images, tokenizer_of
from corda.reading import parse_recipe
from corda.recipe import Recipe

Form = Literal["chat", "plain", "raw"]
Who = Literal["base", "tuned"]
_STOPS = {"plain": ("\nQuestion:", "\n\n"), "chat": (), "raw": ()}


@dataclass(frozen=True)
class Pair:
    """Both models of a run.

    Attributes:
        tuned: The base with the trained adapter.
        base: The bare base where switching the adapter off does not give it, else None.
        tokenizer: Theirs, or the processor of models with images.
        form: How what is typed becomes a prompt.
    """

    tuned: PeftModel
    base: nn.Module | None
    tokenizer: Any
    form: Form


def recipe_of(folder: Path) -> Recipe:
    """The recipe of a finished run, from its results.json.

    Raises:
        ArtifactError: there is no finished run.
    """
    file = folder / "results.json"
    if not file.is_file():
        raise ArtifactError(
            "there is no finished run here", where=str(folder), fix="run the recipe, or name it instead"
        )
    return parse_recipe(artifact.read_json(file)["recipe"], str(file))


def open_pair(recipe: Recipe, form: str | None = None, folder: Path | None = None) -> Pair:
    """Load base and adapter of a trained run; its data files are not needed.

    Args:
        recipe: The run's.
        form: chat, plain ("Question: ... Answer:") or raw; default: as the run was trained.
        folder: Where the run lies; default: the recipe's output_dir.

    Raises:
        ArtifactError: the run has no plan or no trained adapter.
        DataError: there is no such form, or chat without a chat template.
        ModelError: the base cannot be loaded, or it takes images.
    """
    folder = folder or recipe.output_dir
    trained = artifact.read(folder / "train", "train")
    plan = plans.load(artifact.read(folder / "plan", "plan"))
    bases = Bases(Inputs(recipe))
    bases.inputs.kind.refuse_unless_text("corda chat")
    tokenizer = bases.inputs.tokenizer
    if takes_images(tokenizer):
        raise ModelError(
            "chat has no way to show an image", where=recipe.model.model_name_or_path, fix="measure with corda eval"
        )
    chosen = _form(bases.inputs, form)
    four_bit = bases.inputs.quantisation is not None
    held = recipe.adapter.form(four_bit)
    weights = bases.for_context()[1] if four_bit and held == "residual" else None
    tuned = adapter.attach(
        bases.bare(), plan, base=held, seed=recipe.seed, weights=weights.get if weights else None
    ).eval()
    tuned.load_adapter(str(trained.folder), TRAINED)
    base = models.load(bases.inputs.model).model if held == "residual" else None
    return Pair(tuned, base, tokenizer, chosen)


@torch.no_grad()
def reply(
    pair: Pair,
    who: Who,
    turns: Sequence[tuple[str, str]],
    max_new_tokens: int = 256,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """One model's greedy answer.

    Args:
        pair: Both models.
        who: "base" or "tuned".
        turns: (role, content) from the first on; the last is the user's. All but that one count in form chat alone.
        max_new_tokens: Limit in tokens.
        say: Told each piece of the answer as soon as it is there.

    Returns:
        The whole answer, which is what `say` was told in pieces.
    """
    model, off = pair.tuned, nullcontext()
    if who == "base":
        off = nullcontext() if pair.base is not None else pair.tuned.disable_adapter()
        model = pair.base if pair.base is not None else pair.tuned
    device = next(pair.tuned.parameters()).device
    tokens = torch.tensor([list(_prompt(pair, turns))], device=device)
    tokenizer = tokenizer_of(pair.tokenizer)
    spoken = _Spoken(tokenizer, _STOPS[pair.form], say)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_id(pair.tokenizer),
        eos_token_id=end_tokens(pair.tuned, pair.tokenizer),
        stop_strings=list(_STOPS[pair.form]) or None,
    )
    generator: Any = model
    with off:
        generator.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=config,
            tokenizer=tokenizer,
            streamer=spoken,
        )
    return spoken.text


class _Spoken:
    """What `generate` calls a streamer: gets the prompt, then token by token; tells text that is sure to stay."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], say: Callable[[str], None]) -> None:
        self.tokenizer, self.stops, self.say = tokenizer, stops, say
        self.ids: list[int] | None = None
        self.text = ""

    def put(self, tokens: torch.Tensor) -> None:
        """Tokens, of any shape; the first call is the prompt."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += tokens.flatten().tolist()
        self._tell(ended=False)

    def end(self) -> None:
        """Nothing more will come."""
        self._tell(ended=True)

    def _tell(self, *, ended: bool) -> None:
        text = str(self.tokenizer.decode(self.ids or [], skip_special_tokens=True)).lstrip()
        cuts = [text.find(stop) for stop in self.stops if stop in text]
        if cuts:
            text = text[: min(cuts)]
        elif not ended:  # hold back half a character, or what may become a stop string
            text = text.rstrip("\ufffd")
            tails = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
            text = text[: len(text) - max(tails, default=0)]
        if len(text) > len(self.text):
            piece, self.text = text[len(self.text) :], text
            self.say(piece)


def _talks(inputs: Inputs) -> bool:
    """Whether the run was trained on conversations, as far as can be told: its data files may be gone."""
    learn = inputs.recipe.data.learn
    if learn is None or learn.format != "auto":
        return learn is not None and learn.format in {"messages", "sharegpt"}
    with suppress(CordaError):
        return inputs.learn_records[0].always_chat
    return False


def _form(inputs: Inputs, form: str | None) -> Form:
    recipe, tokenizer = inputs.recipe, inputs.tokenizer
    talks = form is None and _talks(inputs)
    chosen = form or ("chat" if talks else recipe.data.template)
    known: dict[str, Form] = {name: name for name in get_args(Form)}
    if chosen not in known:
        raise DataError("there is no such form of prompts", where="--form", got=chosen, expected=", ".join(known))
    if chosen == "chat" and not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template", where="--form", fix="use plain or raw")
    return known[chosen]


def _prompt(pair: Pair, turns: Sequence[tuple[str, str]]) -> Sequence[int]:
    """Token ids, up to where the answer begins."""
    said = turns[-1][1]
    if pair.form == "raw":
        return encode_segments([Segment(said, False)], pair.tokenizer).ids
    if pair.form == "plain":
        (record,) = to_records([{"question": said, "answer": "-"}])
        return prompt(record, pair.tokenizer, "plain").ids
    messages = [{"role": role, "content": content} for role, content in (*turns, ("assistant", "-"))]
    (record,) = to_records([{"messages": messages}])
    return prompt(record, pair.tokenizer, "chat").ids
