"""Tags become part of what is counted and searched, so the two texts of every SAE are written anew."""

import django.contrib.postgres.indexes
import django.contrib.postgres.search
import django.db.models.deletion
from django.conf import settings
from django.db import migrations, models

import saes.facets


class Migration(migrations.Migration):
    dependencies = [
        ("saes", "0013_grant_repositories"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.AlterModelOptions(
            name="sae",
            options={
                "ordering": ("-pk",),
                "permissions": (("tag_sae", "Can tag SAEs"), ("star_sae", "Can star SAEs")),
                "verbose_name": "SAE",
            },
        ),
        migrations.AddField(
            model_name="sae",
            name="tags",
            field=models.JSONField(
                blank=True, default=list, help_text="The team's own words for it, in order of the alphabet"
            ),
        ),
        migrations.RemoveIndex(model_name="sae", name="sae_facets"),
        migrations.RemoveIndex(model_name="sae", name="sae_words"),
        migrations.RemoveField(model_name="sae", name="facets"),
        migrations.RemoveField(model_name="sae", name="words"),
        migrations.AddField(
            model_name="sae",
            name="facets",
            field=models.GeneratedField(
                db_persist=True, expression=saes.facets.FacetsText(), output_field=models.TextField()
            ),
        ),
        migrations.AddField(
            model_name="sae",
            name="words",
            field=models.GeneratedField(
                db_persist=True,
                expression=saes.facets.WordsVector(),
                output_field=django.contrib.postgres.search.SearchVectorField(),
            ),
        ),
        migrations.AddIndex(
            model_name="sae",
            index=models.Index(fields=["facets"], include=("layer", "l0", "published_l0"), name="sae_facets"),
        ),
        migrations.AddIndex(
            model_name="sae",
            index=django.contrib.postgres.indexes.GinIndex(fields=["words"], name="sae_words"),
        ),
        migrations.AddIndex(
            model_name="sae",
            index=django.contrib.postgres.indexes.GinIndex(fields=["tags"], name="sae_tags"),
        ),
        migrations.CreateModel(
            name="Star",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                (
                    "sae",
                    models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name="+", to="saes.sae"),
                ),
                (
                    "user",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE, related_name="+", to=settings.AUTH_USER_MODEL
                    ),
                ),
            ],
            options={"default_permissions": ()},
        ),
        migrations.AddConstraint(
            model_name="star",
            constraint=models.UniqueConstraint(fields=("user", "sae"), name="one_star_a_person"),
        ),
    ]
