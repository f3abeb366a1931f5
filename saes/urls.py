from django.urls import path

from saes import cache_views, catalogue_views, mark_views, one_sae, share_views, views

app_name = "saes"
urlpatterns = [
    path("models/", views.model_list, name="model_list"),
    path("models/new/", views.model_create, name="model_create"),
    path("models/<int:pk>/", views.model_detail, name="model_detail"),
    path("saes/", catalogue_views.sae_list, name="sae_list"),
    path("saes/download/", catalogue_views.sae_download, name="sae_download"),
    path("saes/basket/", catalogue_views.sae_basket, name="sae_basket"),
    path("saes/tags/", mark_views.sae_tag, name="sae_tag"),
    path("saes/sync/", catalogue_views.catalogue_sync, name="catalogue_sync"),
    path("saes/recommended/", catalogue_views.sae_recommended, name="sae_recommended"),
    path("saes/cache/", cache_views.hub_cache, name="hub_cache"),
    path("saes/<int:pk>/state/", catalogue_views.sae_state, name="sae_state"),
    path("saes/import/", one_sae.sae_import, name="sae_import"),
    path("saes/<int:pk>/", one_sae.sae_detail, name="sae_detail"),
    path("saes/<int:pk>/star/", mark_views.sae_star, name="sae_star"),
    path("saes/<int:pk>/start/", one_sae.sae_start, name="sae_start"),
    path("saes/<int:pk>/facts/", one_sae.sae_facts, name="sae_facts"),
    path("saes/<int:pk>/curate/", one_sae.sae_curate, name="sae_curate"),
    path("saes/<int:pk>/access/", share_views.sae_access, name="sae_access"),
    path("saes/<int:pk>/export/", share_views.sae_export, name="sae_export"),
    path("saes/<int:pk>/upload/", share_views.sae_upload, name="sae_upload"),
    path("saes/<int:pk>/archive/<slug:format>/", share_views.sae_archive, name="sae_archive"),
    path("saes/<int:pk>/delete/", one_sae.sae_delete, name="sae_delete"),
]
