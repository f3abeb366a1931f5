from django.urls import path

from saehub.accounts import views

app_name = "accounts"
urlpatterns = [
    path("", views.account_detail, name="account_detail"),
    path("tokens/<int:pk>/delete/", views.token_delete, name="token_delete"),
    path("hub-token/", views.hub_token_set, name="hub_token_set"),
    path("hub-token/check/", views.hub_token_check, name="hub_token_check"),
    path("hub-token/delete/", views.hub_token_delete, name="hub_token_delete"),
]
