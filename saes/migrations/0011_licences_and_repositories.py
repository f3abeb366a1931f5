from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("saes", "0010_sorted_both_ways")]

    operations = [
        migrations.CreateModel(
            name="HubRepository",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("repo_id", models.CharField(max_length=200, unique=True)),
                ("licence", models.CharField(blank=True, help_text="As its card names it", max_length=60)),
                (
                    "gated",
                    models.CharField(
                        blank=True,
                        help_text="auto or manual: who accepts its terms gets its files",
                        max_length=10,
                    ),
                ),
                ("checked_at", models.DateTimeField(auto_now=True)),
            ],
            options={"verbose_name_plural": "Hub repositories"},
        ),
        migrations.AddField(
            model_name="sae",
            name="licence",
            field=models.CharField(
                blank=True,
                help_text="As the Hub names it (mit, apache-2.0, …); empty: its repository's",
                max_length=60,
            ),
        ),
    ]
