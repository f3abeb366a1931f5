"""ASGI entry: pages over HTTP, job cards over web sockets from our own origin."""

import gc
import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "saehub.settings")
django_app = get_asgi_application()

from channels.auth import AuthMiddlewareStack  # noqa: E402  (Django has to be set up first)
from channels.routing import ProtocolTypeRouter, URLRouter  # noqa: E402
from django.conf import settings  # noqa: E402
from django.urls import get_resolver, path  # noqa: E402

from saehub.body_limit import BodyLimit  # noqa: E402
from saehub.jobs.consumers import JobConsumer  # noqa: E402
from saehub.origins import OwnPages  # noqa: E402
from saehub.spool import reading_spooled  # noqa: E402

sockets = URLRouter([path("ws/jobs/<int:pk>/", JobConsumer.as_asgi())])
pages = reading_spooled(BodyLimit(django_app, settings.BODY_LIMIT))
application = ProtocolTypeRouter({"http": pages, "websocket": OwnPages(AuthMiddlewareStack(sockets))})

# Modules, models, forms and URLs stay for ever. The collector is told not to look at them again: each of its full rounds
# stopped all requests for a tenth of a second.
_ = get_resolver().url_patterns
gc.freeze()
