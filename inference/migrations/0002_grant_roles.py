from django.db import migrations

from saehub.accounts.roles import grant


class Migration(migrations.Migration):
    dependencies = [
        ("inference", "0001_generations"),
        ("auth", "0012_alter_user_first_name_max_length"),
        ("contenttypes", "0002_remove_content_type_name"),
    ]

    operations = [
        migrations.RunPython(
            grant(
                "inference",
                {
                    "view_generation": "viewer",
                    "add_generation": "annotator",
                    "delete_generation": "annotator",
                    "change_generation": "curator",
                },
            ),
            migrations.RunPython.noop,
        )
    ]
