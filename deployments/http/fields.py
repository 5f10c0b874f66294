"""Field types of the OpenAI dialect: what is accepted, what is refused by name, what is a no-op."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, StrictInt, StrictStr, TypeAdapter

_ids = TypeAdapter(list[Annotated[StrictInt, Field(ge=0)]])
_texts = TypeAdapter(list[StrictStr])


def no_op(*defaults: object) -> AfterValidator:
    """For a field that is not implemented: null or a default passes, anything else is an error."""

    def check(value: object) -> object:
        # 1 == True and 0 == False in Python, not in JSON.
        if value is None or any(value == each and type(value) is type(each) for each in defaults):
            return value
        raise ValueError("is not implemented; leave it out")

    return AfterValidator(check)


def _stop(value: object) -> object:
    return [value] if isinstance(value, str) else value


Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=4),
    BeforeValidator(_stop, json_schema_input_type=str | list[str]),
]


def _content(value: object) -> object:
    """A message's content: a string, or text parts, joined by line breaks."""
    if not isinstance(value, list):
        return value
    texts = []
    for number, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError(f"part {number} is not of type 'text', the only one implemented")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError(f"part {number} must hold 'type' and a string 'text', nothing else")
        texts.append(part["text"])
    return "\n".join(texts)


Content = Annotated[
    str, BeforeValidator(_content, json_schema_input_type=str | list[dict[str, str]])
]


def _prompts(value: object) -> list[str | tuple[int, ...]]:
    """OpenAI's four spellings of prompts as one list."""
    match value:
        case str():
            return [value]
        case [str(), *_]:
            return list(_texts.validate_python(value))
        case [int(), *_]:
            return [tuple(_ids.validate_python(value))]
        case [list(), *_]:
            return [tuple(_ids.validate_python(each)) for each in value]
    raise ValueError(
        "must be a string, a list of strings, a list of token ids or a list of those, not empty"
    )


Prompts = Annotated[
    list[Any],
    BeforeValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
