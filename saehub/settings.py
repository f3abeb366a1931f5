"""All settings of SAEHub. Every knob is an environment variable, read once through `saehub.environment`."""

from __future__ import annotations

import os
import secrets
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from django.contrib import messages
from django.core.exceptions import ImproperlyConfigured

from saehub import environment as env
from saehub.postgres import database

BASE_DIR = Path(__file__).resolve().parent.parent

# -- where things lie ---------------------------------------------------------------------------------------------------
DATA_DIR = Path(
    env.text("SAEHUB_DATA", str(BASE_DIR / "data"), "Folder of the embedded database, models, captures and SAEs")
)
if DATA_DIR.exists() and not DATA_DIR.is_dir():
    raise ImproperlyConfigured(f"SAEHUB_DATA is {DATA_DIR}, which is a file, not a folder.")
DATA_DIR.mkdir(parents=True, exist_ok=True)
_import = env.words("SAEHUB_IMPORT_DIRS", str(DATA_DIR / "import"), "Folders pages may read corpora and models from")
IMPORT_DIRS = [Path(name) for name in _import]


def _secret_key() -> str:
    """From SECRET_KEY, else from a file made once under the data folder, so that sessions outlive a restart."""
    given = env.text("SECRET_KEY", "", "Signs sessions; made once under the data folder when empty")
    path = DATA_DIR / "secret_key"
    if not given and not path.exists():
        with NamedTemporaryFile("w", dir=DATA_DIR) as file:  # mode 0600, and never seen half written
            file.write(secrets.token_urlsafe(50))
            file.flush()
            with suppress(FileExistsError):  # of two processes at their first start, one makes it
                os.link(file.name, path)
    return given or path.read_text()


SECRET_KEY = _secret_key()
SECRET_KEY_FALLBACKS = env.words(
    "SECRET_KEY_FALLBACKS", "", "Keys of before: sessions and Hub tokens made with them stay good"
)
DEBUG = env.flag("DEBUG", False, "Django's debug pages; never on a server others reach")
ALLOWED_HOSTS = env.words("ALLOWED_HOSTS", "127.0.0.1 localhost [::1]", "Host names the site answers to")
CSRF_TRUSTED_ORIGINS = env.words("CSRF_TRUSTED_ORIGINS", "", "Origins such as https://sae.lab.example behind a proxy")
HTTPS = env.flag("SAEHUB_HTTPS", False, "Set behind a TLS proxy: secure cookies, HSTS, X-Forwarded-Proto is trusted")

# -- database, queue and channel layer: one PostgreSQL ------------------------------------------------------------------
_database = database(
    env.text("DATABASE_URL", "", "A PostgreSQL server of your own; the embedded one when empty"), DATA_DIR
)
DATABASES = {"default": _database, "channels_postgres": {**_database, "TEST": {"MIRROR": "default"}}}
CHANNEL_LAYERS = {"default": {"BACKEND": "channels_postgres.core.PostgresChannelLayer", "CONFIG": _database}}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# django-q2 only carries the job's id; what a job is and how it stands is our row (saehub.jobs). `retry` is short on
# purpose: a task taken by a worker that died comes back after a minute, and the claim in run() makes a second delivery of
# a job that is running or over a no-op.
warnings.filterwarnings("ignore", message="Retry and timeout are misconfigured")
_queue = {"timeout": None, "retry": 60, "max_attempts": 0, "ack_failures": True, "queue_limit": 1, "bulk": 1}
QUEUES = {
    "io": env.integer("SAEHUB_IO_WORKERS", 2, "Worker processes for downloads and imports", least=1),
    "gpu": env.integer(
        "SAEHUB_GPU_WORKERS", 1, "Worker processes for captures, training, evaluation, harvests", least=1
    ),
    "live": env.integer("SAEHUB_LIVE_WORKERS", 1, "Worker processes that keep models warm for the pages", least=1),
}
Q_CLUSTER = {
    "name": "saehub",
    "orm": "default",
    "poll": 0.25,
    "save_limit": -1,
    "scheduler": False,
    "daemonize_workers": False,  # a worker supervises the process of its job
    "log_level": "WARNING",
    **_queue,
    "ALT_CLUSTERS": {name: {"workers": workers, **_queue} for name, workers in QUEUES.items()},
}
JOB_LEASE_SECONDS = env.integer("SAEHUB_JOB_LEASE", 20, "Seconds without a heartbeat after which a job's worker counts as dead", least=2)  # fmt: skip

# -- apps ---------------------------------------------------------------------------------------------------------------
INSTALLED_APPS = [
    "django.forms",
    "saehub.jobs",
    "saehub.accounts",
    "saes",
    "training",
    "concepts",
    "inference",
    "saehub.accounts.apps.HouseAdminConfig",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django.contrib.postgres",
    "django_htmx",
    "ninja",  # for its static files: the page of the API
    "template_partials",
    "django_q",
    "channels",
    "channels_postgres",
    "axes",
    "csp",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "csp.middleware.CSPMiddleware",
    "servestatic.middleware.ServeStaticMiddleware",
    "saehub.error_pages.NotAPage",
    "saehub.accounts.api_problems.ProblemMiddleware",
    "saehub.error_pages.NoZeroBytes",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "saehub.accounts.changes.ChangesMiddleware",
    "saehub.accounts.access.AccessMiddleware",
    "axes.middleware.AxesMiddleware",
]
ROOT_URLCONF = "saehub.urls"
ASGI_APPLICATION = "saehub.asgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "builtins": ["saehub.figures", "template_partials.templatetags.partials", "django.templatetags.static"],
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "saehub.jobs.views.running_jobs",
                "saehub.accounts.access.permissions",
            ],
        },
    }
]
FORM_RENDERER = "saehub.forms.HouseRenderer"
# ours, and the admin's own word for it
MESSAGE_TAGS = {messages.ERROR: "bad error", messages.SUCCESS: "ok success", messages.WARNING: "warn warning"}

# -- accounts -----------------------------------------------------------------------------------------------------------
AUTHENTICATION_BACKENDS = ["axes.backends.AxesStandaloneBackend", "django.contrib.auth.backends.ModelBackend"]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in ("UserAttributeSimilarityValidator", "MinimumLengthValidator", "CommonPasswordValidator", "NumericPasswordValidator")
]  # fmt: skip
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "home"
LOGOUT_REDIRECT_URL = "login"
AXES_FAILURE_LIMIT = env.integer(
    "SAEHUB_LOGIN_FAILURES", 8, "Wrong passwords before a name at an address waits", least=1
)
AXES_COOLOFF_TIME = env.integer("SAEHUB_LOGIN_WAIT_HOURS", 1, "Hours such a name waits", least=1)
AXES_LOCKOUT_PARAMETERS = [["username", "ip_address"]]
PROXIES = env.integer("SAEHUB_PROXIES", 0, "Proxies in front that add to X-Forwarded-For; tells clients apart", least=0)
AXES_CLIENT_IP_CALLABLE = "saehub.accounts.addresses.client_address"
AXES_LOCKOUT_TEMPLATE = "registration/locked.html"
AXES_RESET_ON_SUCCESS = True
AXES_VERBOSE = False

# -- security -----------------------------------------------------------------------------------------------------------
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": ["'none'"],
        "script-src": ["'self'"],
        "style-src": ["'self'"],
        "img-src": ["'self'", "data:"],
        "font-src": ["'self'"],
        "connect-src": ["'self'"],
        "form-action": ["'self'"],
        "frame-ancestors": ["'none'"],
        "base-uri": ["'none'"],
    }
}
X_FRAME_OPTIONS = "DENY"
SECURE_REFERRER_POLICY = "same-origin"
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = HTTPS
SESSION_COOKIE_HTTPONLY = True
if HTTPS:
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    SECURE_HSTS_SECONDS = 31536000

# -- the rest -----------------------------------------------------------------------------------------------------------
LANGUAGE_CODE = "en"
USE_I18N = False
TIME_ZONE = env.text("TZ", "UTC", "Time zone of the pages")
USE_TZ = True
STATIC_URL = "/static/"
STATIC_ROOT = DATA_DIR / "static"
STATICFILES_DIRS = [BASE_DIR / "static"]
SERVESTATIC_USE_FINDERS = True  # straight from the packages and `static/`: no collectstatic step to forget
SERVESTATIC_AUTOREFRESH = DEBUG
UPLOAD_LIMIT = env.integer("SAEHUB_UPLOAD_MB", 512, "Largest corpus file a page accepts, in MB", least=1) * 1024 * 1024
SAE_UPLOAD_LIMIT = (
    env.integer("SAEHUB_SAE_UPLOAD_MB", 8192, "Largest SAE a page accepts, unpacked, in MB", least=1) * 1024 * 1024
)
BODY_LIMIT = max(UPLOAD_LIMIT, SAE_UPLOAD_LIMIT) + 16 * 1024 * 1024  # with what a form sends beside its files
DATA_UPLOAD_MAX_NUMBER_FILES = 10_000  # of a folder that is sent
DATA_UPLOAD_MAX_MEMORY_SIZE = 4 * 1024 * 1024
FILE_UPLOAD_TEMP_DIR = str(DATA_DIR / "tmp")
Path(FILE_UPLOAD_TEMP_DIR).mkdir(parents=True, exist_ok=True)
WARM_BYTES = (
    env.integer("SAEHUB_WARM_MB", 0, "Memory for models and SAEs kept warm in a live worker, in MB; 0: half of what there is")
    * 1024 * 1024
)  # fmt: skip
BATCH_LIMIT = (
    env.integer("SAEHUB_BATCH_MB", 20480, "Largest table that a batch of prompts may write, in MB", least=1)
    * 1024
    * 1024
)
DISK_RESERVE = (
    env.integer("SAEHUB_DISK_RESERVE_MB", 512, "Free disk that long work leaves untouched, in MB") * 1024 * 1024
)

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "stream": sys.stderr, "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": env.text("SAEHUB_LOG_LEVEL", "WARNING", "Least level that is logged")},
}
