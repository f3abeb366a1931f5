from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("saes", "0011_licences_and_repositories")]

    operations = [
        migrations.AddField(
            model_name="sae",
            name="pin",
            field=models.CharField(
                blank=True,
                help_text="Why a curator recommends it at its place; empty: it is not pinned",
                max_length=200,
            ),
        ),
    ]
