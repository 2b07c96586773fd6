"""Which requests are refused, with which limit named, and which just fit."""

from __future__ import annotations

import pytest
from paged_fake import Collector, FakeExecutor, make_request

from appliance.batching.core import EngineCore
from appliance.batching.request import RequestLimits
from appliance.errors import ContextLengthError, InvalidRequestError
from appliance.types import EngineRequest


def serve(core: EngineCore, *requests: EngineRequest) -> Collector:
    collector = Collector()
    for request in requests:
        core.add_request(request)
    while core.has_work:
        collector.add(core.step())
        core.check_integrity()
    return collector


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (make_request("a", [1] * 128), ContextLengthError, "128 tokens.*limit is 128 tokens.*at most 127"),
        (make_request("a", []), InvalidRequestError, "empty"),
        (make_request("a", [1, -1]), InvalidRequestError, "token ids"),
        (make_request("a", [1, 2**31]), InvalidRequestError, "token ids"),
        (make_request("a", [1, 2], resumed=2), InvalidRequestError, "num_resumed_tokens is 2.*0 to 1"),
        (make_request("a", [1], max_tokens=-1), InvalidRequestError, "max_tokens is -1.*at least 0"),
        (
            make_request("a", [1], max_tokens=4, min_tokens=5),
            InvalidRequestError,
            "min_tokens is 5.*0 to max_tokens, 4",
        ),
        (make_request("a", [1], min_tokens=-2), InvalidRequestError, "min_tokens is -2.*at least 0"),
    ],
)
def test_refused_with_the_limit(request_: EngineRequest, error: type[InvalidRequestError], message: str) -> None:
    core = EngineCore(FakeExecutor())
    for refuse in (core.validate, core.add_request):
        with pytest.raises(error, match=message):
            refuse(request_)
    assert not core.has_work


def test_the_page_count_is_a_limit_too() -> None:
    limits = RequestLimits(max_model_len=128, num_pages=5, page_size=4)
    with pytest.raises(ContextLengthError, match=r"KV cache holds 20 tokens.*at most 19"):
        limits.validate(make_request("a", [1] * 20))
    limits.validate(make_request("a", [1] * 19))
    core = EngineCore(FakeExecutor(num_pages=5))
    got = serve(core, make_request("a", [1] * 19), make_request("b", [1, 2], max_tokens=200))
    assert len(got.tokens("a")) == 1
    assert len(got.tokens("b")) == 18


def test_a_prompt_of_the_whole_context_can_be_scored() -> None:
    got = serve(EngineCore(FakeExecutor()), make_request("a", [1] * 128, max_tokens=0, prompt_logprobs=0))
    assert len(got.outputs["a"][0].prompt_logprobs or []) == 128
