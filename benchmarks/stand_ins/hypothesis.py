"""Stands in for hypothesis where it is not installed: property tests are skipped, the rest of their file runs."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest


class _Anything:
    """Whatever a test file does with strategies while it is imported."""

    def __call__(self, *_: Any, **__: Any) -> "_Anything":
        return self

    def __getattr__(self, name: str) -> "_Anything":
        return self


strategies = HealthCheck = Phase = _Anything()


def given(*positional: Any, **named: Any) -> Callable:
    """Skips the test, and leaves the arguments that hypothesis would not fill to pytest."""

    def decorate(test: Callable) -> Callable:
        parameters = [p for p in inspect.signature(test).parameters.values() if p.name not in named]

        @pytest.mark.skip(reason="needs hypothesis")
        def skipped(**_: Any) -> None:
            pass

        skipped.__name__, skipped.__module__ = test.__name__, test.__module__
        skipped.__signature__ = inspect.Signature(parameters[: len(parameters) - len(positional)])
        return skipped

    return decorate


def settings(*_: Any, **__: Any) -> Callable:
    return lambda test: test


example = settings


def assume(condition: Any) -> bool:
    raise RuntimeError("reached only inside of a property test, and those are skipped")
