from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("training", "0007_conversations")]

    operations = [
        migrations.AddField(
            model_name="capture",
            name="roles",
            field=models.JSONField(
                blank=True,
                default=list,
                help_text="Of conversations, only tokens of these roles are kept; empty for all",
            ),
        ),
    ]
