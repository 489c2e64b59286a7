"""Fields of `@strict` configurations: ranges and words, checked whenever a field is set, with ValueErrors that help."""

import difflib
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from huggingface_hub.dataclasses import as_validated_field
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError

from .limits_vivit import LARGEST_SCALE


_Class = TypeVar("_Class", bound=type)


def checked(is_good: Callable[[Any], bool], expected: str) -> Callable[..., Any]:
    """Return a maker of fields, `maker(default=...)`, for values that are good, or None where the type allows it."""

    @as_validated_field
    def maker(value: Any) -> None:
        if value is not None and not is_good(value):
            raise ValueError(f"must be {expected}.")

    return maker


count = checked(lambda value: value >= 1, "a whole number of at least 1")
probability = checked(lambda value: 0 <= value < 1, "a probability of at least 0 and below 1")
scale = checked(lambda value: 0 < value <= LARGEST_SCALE, f"a number above 0 and at most {LARGEST_SCALE:g}")


def one_of(choices: tuple[str, ...], aliases: Iterable[str] = ()) -> Callable[..., Any]:
    """Return a maker of fields for these words, which also take the aliases."""
    known = [*choices, *aliases]

    @as_validated_field
    def maker(value: str | None) -> None:
        if value is not None and value not in known:
            nearest = difflib.get_close_matches(value, known, n=1, cutoff=0.4)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            expected = f" Expected one of {', '.join(map(repr, choices))}." if len(choices) < 10 else ""
            raise ValueError(f"is not known.{hint}{expected}")

    return maker


def with_value_errors(cls: _Class) -> _Class:
    """Let a `@strict` class raise ValueErrors that name field and value; its own errors derive from Exception alone."""

    def converted(method: Any) -> Any:
        @functools.wraps(method)
        def wrapper(self: Any, *args: Any) -> None:
            try:
                method(self, *args)
            except StrictDataclassClassValidationError as error:
                raise ValueError(str(error.__cause__)) from None
            except StrictDataclassFieldValidationError as error:
                name, value = args
                expected = self.__dataclass_fields__[name].type
                expected = expected.__name__ if isinstance(expected, type) else expected
                reason = f"must be of type {expected}." if isinstance(error.__cause__, TypeError) else error.__cause__
                raise ValueError(f"`{name}={value!r}` {reason}") from None

        return wrapper

    for name in ("__setattr__", "validate"):
        setattr(cls, name, converted(getattr(cls, name)))
    return cls
