from django.urls import path

from concepts import views

app_name = "concepts"
urlpatterns = [
    path("saes/<int:pk>/features/", views.feature_list, name="feature_list"),
    path("saes/<int:pk>/features/<int:index>/", views.feature_detail, name="feature_detail"),
]
