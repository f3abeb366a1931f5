from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("saes", "0004_checksums_and_facts_asked")]

    operations = [
        migrations.AddField(
            model_name="sae",
            name="gone_at",
            field=models.DateTimeField(
                editable=False, help_text="When the public directory named it no more", null=True
            ),
        ),
    ]
