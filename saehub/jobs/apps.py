from django.apps import AppConfig


class JobsConfig(AppConfig):
    name = "saehub.jobs"
    label = "jobs"
    verbose_name = "Jobs"
