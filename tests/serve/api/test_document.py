"""The OpenAPI document says what is answered.

`python -m tests.serve.api.test_document http://127.0.0.1:8000 1000` lets schemathesis send that many requests of each
kind to each route of a server that runs.
"""

import contextlib
import json
import logging
import sys
from collections import Counter

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import just
from tests.serve.api.fakes import MODEL
from tests.serve.api.requests import CHAT, NEEDED, TEXT, USER

from fulmen.data import ImageProcessor
from fulmen.serve.api.images import ImageReader


def test_the_document_has_the_errors(new_app):
    document = new_app(api_key="k").openapi()
    responses = document["paths"][CHAT]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "404", "408", "413", "429", "500", "503", "504"}
    assert "text/event-stream" in responses["200"]["content"]
    assert document["paths"][CHAT]["post"]["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/health"]["get"]
    assert "422" not in json.dumps(document)


def attack(schema, examples, model=MODEL):
    """Let schemathesis send what the document allows and what it does not; raises where an answer is not in it.

    Returns the statuses of the answers for each operation.
    """
    limits = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    statuses = {}

    def check(case, mode):
        is_good = mode == schemathesis.GenerationMode.POSITIVE and isinstance(case.body, dict)
        if is_good and "model" in case.body:
            case.body["model"] = model
        send(case)
        if is_good:
            # All fields together seldom fit each other; those that are needed mostly do.
            case.body = {name: value for name, value in case.body.items() if name in NEEDED}
            if case.body.get("messages"):
                case.body["messages"] = [item for item in case.body["messages"] if item["role"] == "user"] or USER
            send(case)

    def send(case):
        # Whether fields fit each other, and whether a prompt is short enough, is not in the document.
        response = case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])
        statuses.setdefault(f"{case.method} {case.path}", Counter())[response.status_code] += 1

    for operation in schema.get_all_operations():
        for mode in schemathesis.GenerationMode:
            cases = operation.ok().as_strategy(generation_mode=mode)
            with contextlib.suppress(Unsatisfiable):  # an operation without parameters has no wrong ones
                limits(given(case=cases, mode=just(mode))(check))()
    return statuses


@pytest.mark.parametrize("sees", [False, True])
def test_the_document_is_true(new_app, tokenizer, caplog, sees):
    app = new_app(images=ImageReader(ImageProcessor(crop_size=56), tokenizer.image_id) if sees else None)
    with caplog.at_level(logging.ERROR):
        statuses = attack(schemathesis.openapi.from_asgi("/openapi.json", app), examples=20)
    assert not caplog.records
    assert len(statuses) == 9
    for path in (CHAT, TEXT, "/tokenize", "/detokenize"):
        assert statuses[f"POST {path}"][200] > 0
        assert statuses[f"POST {path}"][400] > 0


if __name__ == "__main__":
    served = schemathesis.openapi.from_url(sys.argv[1] + "/openapi.json")
    name = httpx.get(sys.argv[1] + "/v1/models").json()["data"][0]["id"]
    print(attack(served, int(sys.argv[2]), name))
