"""The HTTP API: routes, answers and streams, functions, metrics."""

import subprocess
import sys

import pytest
from fastapi.testclient import TestClient
from tests.serve.api.fakes import MODEL
from tests.serve.api.requests import CHAT, GO_ON, HELLO, TEXT, TOOL, error_of, events_of

from fulmen.serve.types import Piece


def test_chat(client, service, tokenizer):
    reply = client.post(CHAT, json=HELLO).json()
    assert reply["id"].startswith("chatcmpl-")
    assert reply["object"] == "chat.completion"
    assert reply["model"] == MODEL
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Lightning keeps a state.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt, params = service.asked[0]
    text = "<beginning_of_sentence>user name=user\nHello<end_of_sentence>\n<beginning_of_sentence>ai name=assistant\n"
    assert tokenizer.decode(prompt, skip_special=False) == text
    assert params.max_tokens is None
    assert reply["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 10,
        "total_tokens": len(prompt) + 10,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert service.open == 0


def test_chat_streams_what_it_answers(client, service):
    body = HELLO | {"logprobs": True, "top_logprobs": 2}
    whole = client.post(CHAT, json=body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events_of(client.post(CHAT, json=body | options))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    *chunks, last = chunks
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == whole["choices"][0]["message"]["content"]
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert tokens == whole["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == text
    assert [len(token["top_logprobs"]) for token in tokens] == [2] * 9
    assert service.open == 0


def test_no_usage_unless_asked_for(client):
    assert all("usage" not in chunk for chunk in events_of(client.post(CHAT, json=HELLO | {"stream": True})))


def test_usage_can_come_with_every_chunk(client):
    options = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    chunks = events_of(client.post(CHAT, json=HELLO | options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[1], counts[-1]) == (1, 10)


def test_several_answers(client, service):
    service.text = ["One.", "Another one.", "The third."]
    reply = client.post(CHAT, json=HELLO | {"n": 3}).json()
    assert [choice["message"]["content"] for choice in reply["choices"]] == service.text
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    chunks = events_of(client.post(CHAT, json=HELLO | {"n": 3, "stream": True}))
    texts = ["", "", ""]
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == service.text


def test_an_empty_answer_is_an_empty_string(client, service):
    service.text = ""
    assert client.post(CHAT, json=HELLO).json()["choices"][0]["message"]["content"] == ""


def test_limits_of_an_answer(client):
    choice = client.post(CHAT, json=HELLO | {"max_tokens": 3}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Lightning", "length")
    choice = client.post(CHAT, json=HELLO | {"stop": [" a"]}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Lightning keeps", "stop")


def test_completions(client, service, tokenizer):
    reply = client.post(TEXT, json=GO_ON).json()
    assert reply["object"] == "text_completion"
    assert reply["choices"] == [
        {"index": 0, "text": "Lightning keeps a state.", "logprobs": None, "finish_reason": "stop"}
    ]
    prompt, _ = service.asked[0]
    assert prompt == [tokenizer.bos_id, *tokenizer.encode("Lightning")]
    client.post(TEXT, json={"model": MODEL, "prompt": "a"})
    assert service.asked[1][1].max_tokens == 16


@pytest.mark.parametrize("prompt", ["<end_of_sentence>", ["a", "b"], [1, 2], [[1, 2], [3]]])
def test_kinds_of_prompts(client, service, tokenizer, prompt):
    body = {"model": MODEL, "prompt": prompt, "n": 2, "max_tokens": 2, "logprobs": 1}
    reply = client.post(TEXT, json=body).json()
    many = prompt if isinstance(prompt[0], list) or prompt == ["a", "b"] else [prompt]
    ids = [[tokenizer.bos_id, *tokenizer.encode(one)] if isinstance(one, str) else one for one in many]
    assert [asked for asked, _ in service.asked] == ids
    assert [choice["index"] for choice in reply["choices"]] == list(range(2 * len(many)))
    assert reply["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert reply["usage"]["completion_tokens"] == 2 * 2 * len(many)
    chunks = events_of(client.post(TEXT, json=body | {"stream": True, "stream_options": {"include_usage": True}}))
    assert chunks[-1]["usage"] == reply["usage"]
    for whole in reply["choices"]:
        parts = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == whole["index"]]
        assert "".join(part["text"] for part in parts) == whole["text"]
        assert [part["finish_reason"] for part in parts] == [None, "length"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for part in parts for value in part["logprobs"][name]] == whole["logprobs"][name]
    assert service.open == 0


def test_logprobs_of_parts_of_characters(client, service, tokenizer):
    service.text = "a🎵b"
    logprobs = client.post(TEXT, json=GO_ON | {"logprobs": 0}).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"][0] == "a"
    assert logprobs["tokens"][1].startswith("bytes:\\xf0")
    assert (logprobs["text_offset"][0], logprobs["text_offset"][-1]) == (0, 2)
    assert logprobs["top_logprobs"] is None
    content = client.post(CHAT, json=HELLO | {"logprobs": True}).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == service.text


def test_a_probability_of_0_can_be_written(client, service):
    from fulmen.serve.types import TokenLogprobs

    least = TokenLogprobs(1, float("-inf"), ((2, float("-inf")),))
    service.pieces = lambda *_: [Piece(text="a", tokens=(1,), logprobs=(least,)), Piece(text="", reason="length")]
    token = client.post(CHAT, json=HELLO | {"logprobs": True, "top_logprobs": 1}).json()["choices"][0]["logprobs"]
    assert token["content"][0]["logprob"] == token["content"][0]["top_logprobs"][0]["logprob"] == -9999.0


def test_calls(client, service, tokenizer):
    service.text = 'Well. <function_call>```typescript\nfunctions.go({"a": 1})\nfunctions.go({})\n```'
    reply = client.post(CHAT, json=HELLO | {"tools": [TOOL]}).json()["choices"][0]
    assert reply["finish_reason"] == "tool_calls"
    assert reply["message"]["content"] == "Well. "
    calls = reply["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "go", "arguments": '{"a": 1}'},
        {"name": "go", "arguments": "{}"},
    ]
    assert len({call["id"] for call in calls}) == 2
    assert "system function_setting=functions" in tokenizer.decode(service.asked[0][0])
    # The same in a stream.
    choices = [
        chunk["choices"][0] for chunk in events_of(client.post(CHAT, json=HELLO | {"tools": [TOOL], "stream": True}))
    ]
    deltas = [delta for choice in choices for delta in choice["delta"].get("tool_calls", [])]
    assert deltas[0] == {
        "index": 0,
        "id": deltas[0]["id"],
        "type": "function",
        "function": {"name": "go", "arguments": ""},
    }
    for index, call in enumerate(calls):
        parts = [delta for delta in deltas if delta["index"] == index]
        assert "".join(part["function"]["arguments"] for part in parts) == call["function"]["arguments"]
        assert ["id" in part for part in parts] == [True] + [False] * (len(parts) - 1)
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_a_call_without_text_has_no_content(client, service):
    service.text = "```typescript\nfunctions.go({})\n```"
    assert client.post(CHAT, json=HELLO | {"tools": [TOOL]}).json()["choices"][0]["message"]["content"] is None
    # Who offers no functions gets no calls.
    for body in (HELLO, HELLO | {"tools": [TOOL], "tool_choice": "none"}):
        reply = client.post(CHAT, json=body).json()["choices"][0]
        assert (reply["message"]["content"], reply["finish_reason"]) == (service.text, "stop")


def test_logprobs_are_all_there_beside_calls(client, service, tokenizer):
    service.text = "Well. ```typescript\nfunctions.go({})\n```"
    body = HELLO | {"tools": [TOOL], "logprobs": True}
    whole = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in whole) == service.text
    choices = [chunk["choices"][0] for chunk in events_of(client.post(CHAT, json=body | {"stream": True}))]
    assert [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]] == whole


def test_models(client):
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == (MODEL, "model", 400)
    assert client.get(f"/v1/models/{MODEL}").json() == card


def test_tokens_there_and_back(client, service, tokenizer):
    reply = client.post("/tokenize", json={"prompt": "Grüße 🎉"}).json()
    assert reply == {"tokens": reply["tokens"], "count": len(reply["tokens"]), "max_model_len": 400}
    assert client.post("/detokenize", json=reply["tokens"] and {"tokens": reply["tokens"]}).json() == {
        "prompt": "<beginning_of_sentence>Grüße 🎉"
    }
    bare = client.post("/tokenize", json={"prompt": "Grüße 🎉", "add_special_tokens": False}).json()
    assert bare["tokens"] == reply["tokens"][1:]
    body = {"messages": HELLO["messages"], "tools": [TOOL]}
    tokens = client.post("/tokenize", json=body).json()["tokens"]
    client.post(CHAT, json=HELLO | {"tools": [TOOL]})
    assert service.asked[0][0] == tokens
    whole = client.post("/tokenize", json=body | {"add_generation_prompt": False}).json()["tokens"]
    assert tokens[: len(whole)] == whole != tokens
    assert error_of(client.post("/detokenize", json={"tokens": [1, 320]}))[::2] == (400, "tokens")


def test_metrics(new_app, service):
    client = TestClient(new_app(render_metrics=lambda: b"fulmen_own 1\n"))
    client.post(CHAT, json=HELLO)
    client.get("/made/up")
    client.request("BREW", CHAT)
    text = client.get("/metrics").text
    assert text.endswith("fulmen_own 1\n")
    assert 'fulmen_http_requests_total{method="POST",route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'fulmen_http_requests_total{method="GET",route="other",status="404"} 1.0' in text
    assert 'method="other"' in text
    assert "fulmen_http_requests_in_flight 1.0" in text
    assert "BREW" not in text
    assert "made" not in text


def test_the_page_may_do_little(client):
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "connect-src 'self'" in policy
    assert "innerHTML" not in response.text
    assert "//" not in response.text.replace("http://www.w3.org/2000/svg", "").replace("// ", "")


def test_serving_is_imported_where_it_is_used():
    code = (
        "import sys, fulmen.serve; print([name for name in ('fastapi', 'uvicorn', 'pydantic') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
