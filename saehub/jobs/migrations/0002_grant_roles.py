from django.db import migrations

from saehub.accounts.roles import grant


class Migration(migrations.Migration):
    dependencies = [
        ("jobs", "0001_jobs"),
        ("accounts", "0001_api_tokens"),
        ("auth", "0012_alter_user_first_name_max_length"),
        ("contenttypes", "0002_remove_content_type_name"),
    ]

    operations = [
        migrations.RunPython(
            grant(
                "jobs",
                {
                    "view_job": "viewer",
                    "add_job": "curator",
                    "view_jobline": "viewer",
                    "cancel_job": "annotator",
                    "delete_job": "curator",
                },
            ),
            migrations.RunPython.noop,
        )
    ]
