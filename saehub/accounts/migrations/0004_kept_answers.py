import django.db.models.deletion
from django.conf import settings
from django.db import migrations, models

from saehub.accounts.roles import grant


class Migration(migrations.Migration):
    dependencies = [
        ("accounts", "0003_hub_tokens"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name="KeptAnswer",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("key", models.CharField(max_length=200)),
                (
                    "digest",
                    models.CharField(
                        help_text="Of the request: the same key with another one is refused", max_length=64
                    ),
                ),
                ("status", models.PositiveSmallIntegerField(default=0)),
                ("body", models.JSONField(null=True)),
                ("expires_at", models.DateTimeField(db_index=True)),
                (
                    "owner",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE, related_name="+", to=settings.AUTH_USER_MODEL
                    ),
                ),
            ],
            options={
                "ordering": ("-pk",),
                "constraints": [models.UniqueConstraint(fields=("owner", "key"), name="one_answer_of_a_key")],
            },
        ),
        migrations.RunPython(
            grant("accounts", {"view_keptanswer": "admin", "delete_keptanswer": "admin"}), migrations.RunPython.noop
        ),
    ]
