from django.urls import path

from training import views

app_name = "training"
urlpatterns = [
    path("corpora/", views.corpus_list, name="corpus_list"),
    path("corpora/new/", views.corpus_create, name="corpus_create"),
    path("corpora/<int:pk>/", views.corpus_detail, name="corpus_detail"),
    path("captures/", views.capture_list, name="capture_list"),
    path("captures/new/", views.capture_create, name="capture_create"),
    path("captures/<int:pk>/", views.capture_detail, name="capture_detail"),
    path("training/", views.run_list, name="run_list"),
    path("training/new/", views.run_create, name="run_create"),
    path("training/<int:pk>/", views.run_detail, name="run_detail"),
    path("training/<int:pk>/stop/", views.run_stop, name="run_stop"),
    path("training/<int:pk>/points.csv", views.run_points, name="run_points"),
    path("saes/<int:pk>/evaluate/", views.evaluation_create, name="evaluation_create"),
]
