"""The thread that renders, tokenises and compiles what requests bring, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from deployments.errors import ApiError

T = TypeVar("T")


class Tokenising:
    """One thread: long prompts do not hold up the event loop, and a fast tokenizer's encode is not shared.

    At most `max_requests` have work with it at a time; what is beyond that is refused at once.
    """

    def __init__(self, max_requests: int) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="medusa-tokenise")
        self._max_requests = max_requests
        self._requests = 0

    async def run(self, param: str, work: Callable[[], T]) -> T:
        """The result of `work`; its ValueError (a template that refuses these messages, among others) is a 400 that
        names `param`. Work that is cancelled before its turn is not done."""
        if self._requests >= self._max_requests:
            message = f"{self._requests} requests wait to be tokenised, as many as may; send it again in a moment."
            raise ApiError(429, message, headers={"Retry-After": "1"})
        self._requests += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except ValueError as error:
            raise ApiError(400, str(error), param=param) from error
        finally:
            self._requests -= 1
