import django.core.validators
import django.db.models.deletion
from django.conf import settings
from django.db import migrations, models

from saehub.accounts.roles import grant


class Migration(migrations.Migration):
    dependencies = [
        ("concepts", "0007_look_at_long_files"),
        ("jobs", "0002_grant_roles"),
        ("saes", "0015_grant_tags_and_stars"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name="Explanation",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("name", models.CharField(max_length=120)),
                ("created_at", models.DateTimeField(auto_now_add=True)),
                ("ready_at", models.DateTimeField(blank=True, editable=False, null=True)),
                ("features", models.JSONField(help_text="Their numbers")),
                (
                    "n_shown",
                    models.PositiveSmallIntegerField(
                        default=10,
                        validators=[
                            django.core.validators.MinValueValidator(1),
                            django.core.validators.MaxValueValidator(50),
                        ],
                    ),
                ),
                (
                    "n_tested",
                    models.PositiveSmallIntegerField(
                        default=10, validators=[django.core.validators.MaxValueValidator(100)]
                    ),
                ),
                (
                    "accept_from",
                    models.FloatField(
                        blank=True,
                        default=0.8,
                        null=True,
                        validators=[
                            django.core.validators.MinValueValidator(0.5),
                            django.core.validators.MaxValueValidator(1),
                        ],
                    ),
                ),
                (
                    "found",
                    models.JSONField(
                        default=list,
                        editable=False,
                        help_text="[{feature, text, score, n_active, n_silent, fault, accepted}]",
                    ),
                ),
                ("seconds", models.FloatField(editable=False, null=True)),
                (
                    "job",
                    models.ForeignKey(
                        blank=True,
                        editable=False,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="+",
                        to="jobs.job",
                    ),
                ),
                (
                    "model",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="explanations",
                        to="saes.languagemodel",
                    ),
                ),
                (
                    "owner",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="+",
                        to=settings.AUTH_USER_MODEL,
                    ),
                ),
                (
                    "view",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="explanations",
                        to="concepts.featureview",
                    ),
                ),
            ],
            options={
                "ordering": ("-pk",),
            },
        ),
        migrations.RunPython(
            grant(
                "concepts",
                {
                    "view_explanation": "viewer",
                    "add_explanation": "researcher",
                    "delete_explanation": "researcher",
                    "change_explanation": "curator",
                },
            ),
            migrations.RunPython.noop,
        ),
    ]
