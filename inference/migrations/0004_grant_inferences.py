from django.db import migrations

from saehub.accounts.roles import grant


class Migration(migrations.Migration):
    dependencies = [
        ("inference", "0003_inferences"),
        ("auth", "0012_alter_user_first_name_max_length"),
        ("contenttypes", "0002_remove_content_type_name"),
    ]

    operations = [
        migrations.RunPython(
            grant(
                "inference",
                {
                    "view_inference": "viewer",
                    "add_inference": "annotator",
                    "delete_inference": "annotator",
                    "change_inference": "curator",
                    "view_promptbatch": "viewer",
                    "add_promptbatch": "researcher",
                    "delete_promptbatch": "researcher",
                    "change_promptbatch": "curator",
                },
            ),
            migrations.RunPython.noop,
        )
    ]
