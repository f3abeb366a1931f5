from django.db import migrations

from saehub.accounts.roles import grant


class Migration(migrations.Migration):
    dependencies = [
        ("accounts", "0001_api_tokens"),
        ("auth", "0012_alter_user_first_name_max_length"),
        ("contenttypes", "0002_remove_content_type_name"),
    ]

    operations = [
        migrations.RunPython(
            grant(
                "accounts",
                {
                    "view_apitoken": "admin",
                    "change_apitoken": "admin",
                    "delete_apitoken": "admin",
                    "use_admin": "curator",
                    "act_for_others": "curator",
                },
            ),
            migrations.RunPython.noop,
        )
    ]
