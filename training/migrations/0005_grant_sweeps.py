from django.db import migrations

from saehub.accounts.roles import grant


class Migration(migrations.Migration):
    dependencies = [
        ("training", "0004_sweeps_streams_and_devices"),
        ("auth", "0012_alter_user_first_name_max_length"),
        ("contenttypes", "0002_remove_content_type_name"),
    ]

    operations = [
        migrations.RunPython(
            grant(
                "training",
                {"view_sweep": "viewer"} | {f"{action}_sweep": "researcher" for action in ("add", "change", "delete")},
            ),
            migrations.RunPython.noop,
        )
    ]
