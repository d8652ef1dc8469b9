"""JSON values to the package's frozen dataclasses, checked by pydantic; what is wrong becomes one line with a field."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar, cast

from superexperts.core.errors import DataError

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

__all__ = ["check_schema", "validated"]

T = TypeVar("T")


def validated(kind: type[T], value: Any, field: str, advice: str) -> T:
    """`value`, as `json.loads` returns it, as an object of the dataclass `kind`.

    Fields that `kind` does not have are ignored, since later versions may write more. Fields that are missing take
    their defaults. `DataError` about `field` says where in the value something is missing or wrong, and `advice`.
    """
    try:
        return cast(T, _adapter(cast(Any, kind)).validate_python(value))
    except ValueError as error:  # pydantic's ValidationError is one; naming it here would import pydantic at the start
        raise DataError(f"{_first(cast('ValidationError', error))}; {advice}", field=field) from error


def check_schema(value: Any, schema: str, field: str, advice: str = "give the right file") -> None:
    """`DataError` unless `value` is a JSON object with this schema."""
    found = value.get("schema") if isinstance(value, dict) else type(value).__name__
    if found != schema:
        what = "none" if found is None else repr(found)
        raise DataError(f"expected a file of schema {schema!r}, found {what}; {advice}", field=field)


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter  # takes 35 ms to import, and many commands read no JSON

    return TypeAdapter(kind)


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, such as `runs.0.seed is missing` or `kind: 'essay' should be ...`."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{place} is missing"
    is_object = first["type"] in ("dataclass_type", "dict_type")
    what = "an object" if is_object else first["msg"].removeprefix("Input should be ")
    return f"{place}: {first['input']!r:.40} should be {what}".removeprefix(": ")
