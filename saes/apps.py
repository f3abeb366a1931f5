from django.apps import AppConfig


class SaesConfig(AppConfig):
    name = "saes"
    verbose_name = "SAEs"
