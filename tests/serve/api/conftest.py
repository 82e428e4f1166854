"""An app around a service that says what a test tells it to."""

import pytest
from fastapi.testclient import TestClient
from tests.serve.api.fakes import MODEL, FakeService

from fulmen.serve.api.app import create_app


@pytest.fixture
def service(tokenizer):
    return FakeService(tokenizer)


@pytest.fixture
def new_app(service, tokenizer):
    return lambda **settings: create_app(service, model_name=MODEL, tokenizer=tokenizer, **settings)


@pytest.fixture
def app(new_app):
    return new_app()


@pytest.fixture
def client(app):
    return TestClient(app)
