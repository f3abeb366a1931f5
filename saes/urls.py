from django.urls import path

from saes import views

app_name = "saes"
urlpatterns = [
    path("models/", views.model_list, name="model_list"),
    path("models/new/", views.model_create, name="model_create"),
    path("models/<int:pk>/", views.model_detail, name="model_detail"),
    path("saes/", views.sae_list, name="sae_list"),
    path("saes/<int:pk>/", views.sae_detail, name="sae_detail"),
]
