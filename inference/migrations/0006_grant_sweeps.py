from django.db import migrations

from saehub.accounts.roles import grant


class Migration(migrations.Migration):
    dependencies = [
        ("inference", "0005_scopes_sweeps_and_residents"),
        ("auth", "0012_alter_user_first_name_max_length"),
        ("contenttypes", "0002_remove_content_type_name"),
    ]

    operations = [
        migrations.RunPython(
            grant(
                "inference",
                {
                    "view_sweep": "viewer",
                    "add_sweep": "annotator",
                    "delete_sweep": "annotator",
                    "change_sweep": "curator",
                    "view_resident": "viewer",
                },
            ),
            migrations.RunPython.noop,
        )
    ]
