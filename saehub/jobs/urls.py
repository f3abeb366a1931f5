from django.urls import path

from saehub.jobs import views

app_name = "jobs"
urlpatterns = [
    path("", views.job_list, name="job_list"),
    path("running/", views.job_running, name="job_running"),
    path("workers/", views.worker_list, name="worker_list"),
    path("probe/", views.job_probe, name="job_probe"),
    path("<int:pk>/", views.job_detail, name="job_detail"),
    path("<int:pk>/log.txt", views.job_log, name="job_log"),
    path("<int:pk>/cancel/", views.job_cancel, name="job_cancel"),
    path("<int:pk>/retry/", views.job_retry, name="job_retry"),
]
