from django.urls import path

from concepts import config_views, dictionary_views, feature_views, import_views, search_views, views

app_name = "concepts"
urlpatterns = [
    path("features/", search_views.feature_search, name="feature_search"),
    path("saes/<int:pk>/features/", views.feature_list, name="feature_list"),
    path("saes/<int:pk>/features/export/", views.feature_export, name="feature_export"),
    path("saes/<int:pk>/features/<int:index>/", feature_views.feature_detail, name="feature_detail"),
    path("saes/<int:pk>/features/<int:index>/label/", import_views.label_create, name="label_create"),
    path("saes/<int:pk>/features/<int:index>/concept/", dictionary_views.member_add, name="member_add"),
    path("saes/<int:pk>/labels/", import_views.label_files, name="label_files"),
    path("saes/<int:pk>/labels/import/", import_views.label_import, name="label_import"),
    path("saes/<int:pk>/labels/export/", import_views.label_export, name="label_export"),
    path("labels/<int:pk>/accept/", import_views.label_accept, name="label_accept"),
    path("labels/<int:pk>/describe/", import_views.label_describe, name="label_describe"),
    path("labels/changes/<int:pk>/undo/", import_views.label_undo, name="label_undo"),
    path("labels/<int:pk>/delete/", import_views.label_delete, name="label_delete"),
    path("concepts/", dictionary_views.dictionary_list, name="dictionary_list"),
    path("concepts/new/", dictionary_views.dictionary_create, name="dictionary_create"),
    path("concepts/<int:pk>/", dictionary_views.dictionary_detail, name="dictionary_detail"),
    path("concepts/<int:pk>/edit/", dictionary_views.dictionary_edit, name="dictionary_edit"),
    path("concepts/<int:pk>/delete/", dictionary_views.dictionary_delete, name="dictionary_delete"),
    path("concepts/<int:pk>/history/", dictionary_views.dictionary_history, name="dictionary_history"),
    path("concepts/<int:pk>/import/", import_views.dictionary_import, name="dictionary_import"),
    path("concepts/<int:pk>/export/", dictionary_views.dictionary_export, name="dictionary_export"),
    path("concepts/<int:pk>/new/", dictionary_views.concept_create, name="concept_create"),
    path("concepts/concept/<int:pk>/", dictionary_views.concept_detail, name="concept_detail"),
    path("concepts/concept/<int:pk>/edit/", dictionary_views.concept_edit, name="concept_edit"),
    path("concepts/imports/<int:pk>/", import_views.import_detail, name="import_detail"),
    path("concepts/configs/", config_views.config_list, name="config_list"),
    path("concepts/configs/new/", config_views.config_create, name="config_create"),
    path("concepts/configs/read/", config_views.config_read, name="config_read"),
    path("concepts/configs/<int:pk>/", config_views.config_detail, name="config_detail"),
]
