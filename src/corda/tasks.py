"""A recipe's data sets and evaluation tasks; `corda.recipe` holds the blocks that name them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from corda.options import PositiveInt, Strict

RecordFormat = Literal[
    "auto",
    "qa",
    "alpaca",
    "prompt_completion",
    "messages",
    "sharegpt",
    "text",
    "choice",
    "code",
    "classification",
    "tagged",
]
Metric = Literal["answer_loss", "exact_match", "perplexity", "accuracy", "pass_at_1", "loss", "f1"]


class DataSource(Strict):
    """One data set: a Hub id or a json, jsonl, csv or parquet file."""

    dataset: str = Field(description="Hub id, or a file (relative to data.data_dir, else to the working folder)")
    name: str | None = Field(None, description="Hub configuration name")
    split: str = Field("train", description="split, for Hub data sets")
    format: RecordFormat = Field("auto", description="record format; auto looks at the fields")
    columns: dict[str, str] = Field(
        default_factory=dict, description="mapping from a format's field to your column, e.g. {question: q}"
    )
    max_records: PositiveInt | None = Field(None, description="use at most this many, drawn with the run's seed")
    part: tuple[int, int] | None = Field(
        None, description="use only records [from, to) of one fixed random order: the same ones for every seed"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: object) -> object:
        return {"dataset": value} if isinstance(value, str) else value

    @field_validator("part")
    @classmethod
    def _not_empty(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 0 <= value[0] < value[1]:
            raise ValueError("a part is [from, to) with 0 <= from < to")
        return value


class EvaluationTask(Strict):
    """One held-out data set with its metrics."""

    dataset: DataSource
    measures: Literal["learn", "keep"] = Field(description="which side of the bargain it measures")
    metrics: list[Metric] = Field(["answer_loss"], min_length=1)
    shots: int = Field(0, ge=0, description="solved examples before each question, from `shots_from`")
    shots_from: DataSource | None = Field(None, description="where the shots come from; default: data.keep/learn")
    max_new_tokens: PositiveInt = Field(32, description="for exact_match")
    stop: list[str] = Field(
        default_factory=lambda: ["\n"],
        description="generated text ends before these; default with answer_after: the next question",
    )
    answer_after: str | None = Field(None, description="compare what follows the last one of this alone, e.g. '####'")
    choice_prompt: str = Field("{context}", description="for accuracy: how a context is put to the model")

    @model_validator(mode="before")
    @classmethod
    def _lines_before_the_answer(cls, value: object) -> object:
        """A mark of the answer that lies some lines down is never reached where text ends with the first line."""
        if isinstance(value, dict) and value.get("answer_after") and "stop" not in value:
            return value | {"stop": ["Question:"]}
        return value

    @field_validator("metrics")
    @classmethod
    def _no_mixture(cls, value: list[Metric]) -> list[Metric]:
        alone = {"perplexity", "accuracy"} & set(value)
        if alone and set(value) - {"accuracy", "loss", "f1"} and len(value) > 1:
            raise ValueError(f"{sorted(alone)[0]} stands alone; give the other metrics a task of their own")
        return value


class EvaluationOptions(Strict):
    """What is measured before and after training."""

    tasks: dict[str, EvaluationTask] = Field(default_factory=dict)
    batch_size: PositiveInt = 16
    window: PositiveInt = Field(1024, description="tokens per window, for perplexity")
    samples_shown: int = Field(4, ge=0, description="generated answers per task kept for the report")
    execute_code: bool = Field(False, description="for pass_at_1: run what the model writes, see docs/evaluation.md")
