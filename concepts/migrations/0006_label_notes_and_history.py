import django.db.models.deletion
from django.conf import settings
from django.db import migrations, models

from saehub.accounts.roles import grant


def scores_by_name(apps, schema_editor):
    """What imports replaced was the score alone; now confidence and notes may be too."""
    for row in apps.get_model("concepts", "ConceptImport").objects.exclude(replaced=[]):
        row.replaced = [[pk, {"score": score}] for pk, score in row.replaced]
        row.save(update_fields=["replaced"])


class Migration(migrations.Migration):
    dependencies = [
        ("concepts", "0005_label_words"),
        ("saes", "0009_changes_of_the_list"),
        ("auth", "0012_alter_user_first_name_max_length"),
        ("contenttypes", "0002_remove_content_type_name"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.AddField(
            model_name="label",
            name="notes",
            field=models.TextField(blank=True, help_text="Why it is called so, and what does not fit"),
        ),
        migrations.AlterField(
            model_name="conceptimport",
            name="replaced",
            field=models.JSONField(
                default=list, editable=False, help_text="[[label, {score, confidence, notes} it had]]"
            ),
        ),
        migrations.CreateModel(
            name="LabelChange",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("feature", models.PositiveIntegerField()),
                ("what", models.CharField(max_length=540)),
                ("before", models.JSONField()),
                ("after", models.JSONField()),
                ("created_at", models.DateTimeField(auto_now_add=True)),
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
                    "sae",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE, related_name="label_changes", to="saes.sae"
                    ),
                ),
            ],
            options={
                "ordering": ("-pk",),
                "indexes": [models.Index(fields=["sae", "feature"], name="label_changes_of_a_feature")],
            },
        ),
        migrations.RunPython(scores_by_name, migrations.RunPython.noop),
        migrations.RunPython(grant("concepts", {"view_labelchange": "viewer"}), migrations.RunPython.noop),
    ]
