from django.urls import path

from inference import views

app_name = "inference"
urlpatterns = [
    path("steering/", views.generation_list, name="generation_list"),
    path("steering/new/", views.generation_create, name="generation_create"),
    path("steering/<int:pk>/", views.generation_detail, name="generation_detail"),
]
