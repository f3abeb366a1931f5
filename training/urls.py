from django.urls import path

from training import evaluation_views, run_views, views

app_name = "training"
urlpatterns = [
    path("corpora/", views.corpus_list, name="corpus_list"),
    path("corpora/new/", views.corpus_create, name="corpus_create"),
    path("corpora/<int:pk>/", views.corpus_detail, name="corpus_detail"),
    path("captures/", views.capture_list, name="capture_list"),
    path("captures/new/", views.capture_create, name="capture_create"),
    path("captures/<int:pk>/", views.capture_detail, name="capture_detail"),
    path("captures/<int:pk>/capture.yaml", views.capture_yaml, name="capture_yaml"),
    path("captures/<int:pk>/<slug:kind>/", views.capture_action, name="capture_action"),
    path("training/", run_views.run_list, name="run_list"),
    path("training/new/", run_views.run_create, name="run_create"),
    path("training/<int:pk>/", run_views.run_detail, name="run_detail"),
    path("training/<int:pk>/stop/", run_views.run_stop, name="run_stop"),
    path("training/<int:pk>/pause/", run_views.run_pause, name="run_pause"),
    path("training/<int:pk>/resume/", run_views.run_resume, name="run_resume"),
    path("training/<int:pk>/points.csv", run_views.run_points, name="run_points"),
    path("training/<int:pk>/run.yaml", run_views.run_yaml, name="run_yaml"),
    path("training/sweeps/<int:pk>/sweep.yaml", run_views.sweep_yaml, name="sweep_yaml"),
    path("training/sweeps/", run_views.sweep_list, name="sweep_list"),
    path("training/sweeps/<int:pk>/", run_views.sweep_detail, name="sweep_detail"),
    path("training/sweeps/<int:pk>/stop/", run_views.sweep_stop, name="sweep_stop"),
    path("training/sweeps/<int:pk>/pause/", run_views.sweep_pause, name="sweep_pause"),
    path("training/sweeps/<int:pk>/resume/", run_views.sweep_resume, name="sweep_resume"),
    path("saes/<int:pk>/evaluate/", evaluation_views.evaluation_create, name="evaluation_create"),
    path("saes/compare/", evaluation_views.sae_compare, name="sae_compare"),
    path("evaluations/<int:pk>/saebench.json", evaluation_views.evaluation_saebench, name="evaluation_saebench"),
]
