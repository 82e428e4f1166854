"""The page of a server that says what the test wants. No other host is asked for anything."""

import pytest
from tests.serve.api.fakes import MODEL, FakeService, live
from tests.serve.api.page.browser import browser

from fulmen.serve.api.app import create_app


@pytest.fixture(scope="module")
def _page():
    with browser() as page:
        yield page


@pytest.fixture
def service(tokenizer):
    return FakeService(tokenizer)


@pytest.fixture
def key():
    return None


@pytest.fixture
def images():
    return None


@pytest.fixture
def app(service, tokenizer, key, images):
    return create_app(service, model_name=MODEL, tokenizer=tokenizer, api_key=key, images=images)


@pytest.fixture
def page(_page, app):
    """The page, loaded from its server and as new."""
    with live(app) as address:
        _page.unroute_all()
        _page.goto(address)
        _page.complaints.clear()
        _page.asked.clear()
        _page.address = address
        _page.reload()
        yield _page
        assert all(url.startswith((address, "data:")) for url in _page.asked)
