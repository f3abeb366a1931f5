"""Wiring of the site (settings, URLs, ASGI, API) above; jobs and accounts below."""
