from django.conf import settings
from django.contrib import admin
from django.contrib.auth.views import LoginView, LogoutView, PasswordChangeView
from django.urls import include, path, reverse_lazy

from saehub import views
from saehub.accounts.access import LOGIN, PUBLIC, needs
from saehub.api import api

handler400 = "saehub.error_pages.bad_request"
urlpatterns = [
    path("", views.home, name="home"),
    path("search/", views.search, name="search"),
    path("healthz", views.health, name="health"),
    path("readyz", views.ready, name="ready"),
    path("favicon.ico", views.favicon, name="favicon"),
    path("login/", needs(PUBLIC)(LoginView.as_view(redirect_authenticated_user=True)), name="login"),
    path("logout/", needs(PUBLIC)(LogoutView.as_view()), name="logout"),
    path(
        "account/password/",
        needs(LOGIN)(
            PasswordChangeView.as_view(
                template_name="accounts/password_change.html", success_url=reverse_lazy("accounts:account_detail")
            )
        ),
        name="password_change",
    ),
    path("account/", include("saehub.accounts.urls")),
    path("jobs/", include("saehub.jobs.urls")),
    path("", include("saes.urls")),
    path("", include("training.urls")),
    path("", include("concepts.urls")),
    path("", include("inference.urls")),
    path("admin/", admin.site.urls),
    path("api/v1/docs", views.api_docs, name="api_docs"),
    path("api/v1/", api.urls),
]
if settings.DEBUG:
    urlpatterns.append(path("style/", views.style, name="style"))
