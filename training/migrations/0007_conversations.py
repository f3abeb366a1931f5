from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("training", "0006_run_error"),
    ]

    operations = [
        migrations.AddField(
            model_name="corpus",
            name="chats",
            field=models.BooleanField(
                default=False, editable=False, help_text="Its documents are conversations: lists of messages"
            ),
        ),
        migrations.AddField(
            model_name="capture",
            name="plain_chats",
            field=models.BooleanField(
                default=False, help_text="Messages of conversations are joined plainly, as role: content"
            ),
        ),
    ]
