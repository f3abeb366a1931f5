"""Wiring of the site (settings, URLs, ASGI, API) above; jobs and accounts below."""

__version__ = "0.1.0"
