from django.urls import path

from inference import feature_views, infer_views, search_views, views

app_name = "inference"
urlpatterns = [
    path("playground/", infer_views.inference_list, name="inference_list"),
    path("playground/new/", infer_views.inference_create, name="inference_create"),
    path("playground/<int:pk>/", infer_views.inference_detail, name="inference_detail"),
    path("playground/batches/", infer_views.promptbatch_list, name="promptbatch_list"),
    path("playground/batches/new/", infer_views.promptbatch_create, name="promptbatch_create"),
    path("playground/batches/<int:pk>/", infer_views.promptbatch_detail, name="promptbatch_detail"),
    path("playground/batches/<int:pk>/features.parquet", infer_views.promptbatch_file, name="promptbatch_file"),
    path("features/contrast/", search_views.text_contrast, name="text_contrast"),
    path("features/text/", search_views.text_search, name="text_search"),
    path("playground/saes/<int:pk>/features/<int:index>/", feature_views.feature_text, name="feature_text"),
    path("steering/", views.generation_list, name="generation_list"),
    path("steering/new/", views.generation_create, name="generation_create"),
    path("steering/suggest/", views.edit_suggest, name="edit_suggest"),
    path("steering/<int:pk>/", views.generation_detail, name="generation_detail"),
    path("steering/<int:pk>/sweep/", views.sweep_create, name="sweep_create"),
    path("steering/sweeps/<int:pk>/", views.sweep_detail, name="sweep_detail"),
]
