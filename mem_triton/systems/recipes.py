"""Options of a training run as a pydantic model, with errors that name the option."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Made = TypeVar("Made", bound=BaseModel)


class RecipeError(ValueError):
    """An option of a training run that cannot be; the message names it."""


def make_recipe(kind: type[Made], fields: Mapping[str, Any]) -> Made:
    """Make a recipe of these fields. Raises RecipeError naming the option."""
    try:
        return kind(**fields)
    except ValidationError as error:
        raise refused(error) from None


def refused(error: ValidationError) -> RecipeError:
    """The first problem, with the name of the option that a user gave."""
    problem = error.errors()[0]
    message = problem["msg"].removeprefix("Value error, ")
    if message.startswith("--"):
        return RecipeError(message)
    name = str(problem["loc"][0]).replace("_", "-") if problem["loc"] else ""
    return RecipeError(f"--{name}: {message}, got {str(problem['input'])!r:.80}")
