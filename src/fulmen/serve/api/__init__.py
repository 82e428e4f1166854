"""What a client sees: OpenAI's routes as a FastAPI application (`app.py`), and the page to chat on."""
