from django.db import migrations

from saehub.accounts.roles import grant


class Migration(migrations.Migration):
    """Who is an admin by group may make accounts and give them groups, as a superuser may."""

    dependencies = [
        ("accounts", "0004_kept_answers"),
        ("auth", "0012_alter_user_first_name_max_length"),
        ("contenttypes", "0002_remove_content_type_name"),
    ]

    operations = [
        migrations.RunPython(
            grant(
                "auth",
                {
                    "view_user": "admin",
                    "add_user": "admin",
                    "change_user": "admin",
                    "delete_user": "admin",
                    "view_group": "admin",
                },
            ),
            migrations.RunPython.noop,
        )
    ]
