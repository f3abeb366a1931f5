from django.urls import path

from saehub.accounts import views

app_name = "accounts"
urlpatterns = [
    path("", views.account_detail, name="account_detail"),
    path("tokens/<int:pk>/delete/", views.token_delete, name="token_delete"),
]
