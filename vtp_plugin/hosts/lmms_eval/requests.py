"""The host's requests, given to its model one task at a time.

Several of its model classes batch requests over tasks and read every document of a batch from the first one's task: the
wrong picture is shown, and no record can be told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

REQUESTS = ("generate_until", "loglikelihood", "generate_until_multi_round")


def by_task(ask: Callable[[Sequence[Any]], Sequence[Any]], requests: Sequence[Any]) -> list[Any]:
    """The answers to all requests, in their order."""
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(request.task_name, []).append(number)
    if len(groups) < 2:
        return ask(requests)
    answers: list[Any] = [None] * len(requests)
    for numbers in groups.values():
        for number, answer in zip(numbers, ask([requests[n] for n in numbers]), strict=True):
            answers[number] = answer
    return answers
