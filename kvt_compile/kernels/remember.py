"""A function -> one that runs once for the same arguments, whether it returns or fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Remembered(Generic[P, T]):
    """As `functools.lru_cache`, but a failure is remembered too: what takes a minute to fail should fail once."""

    def __init__(self, function: Callable[P, T], maxsize: int, errors: tuple[type[Exception], ...]) -> None:
        @lru_cache(maxsize)
        def outcome(*args: Any, **kwargs: Any) -> tuple[T | None, Exception | None]:
            try:
                return function(*args, **kwargs), None
            except errors as error:
                return None, error.with_traceback(None)  # with it, everything on the stack would stay alive

        self._outcome = outcome
        self.cache_clear = outcome.cache_clear
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        result, error = self._outcome(*args, **kwargs)  # type: ignore[arg-type]
        if error is not None:
            raise type(error)(*error.args)
        return result  # type: ignore[return-value]


def remembered(maxsize: int, *errors: type[Exception]) -> Callable[[Callable[P, T]], Remembered[P, T]]:
    """As a decorator; `errors` are the failures to remember, which take their arguments as they are in `args`."""
    return lambda function: Remembered(function, maxsize, errors)
