from django.db import migrations

from saehub.accounts.roles import grant


class Migration(migrations.Migration):
    dependencies = [
        ("saes", "0001_models_and_saes"),
        ("auth", "0012_alter_user_first_name_max_length"),
        ("contenttypes", "0002_remove_content_type_name"),
    ]

    operations = [
        migrations.RunPython(
            grant(
                "saes",
                {
                    "view_languagemodel": "viewer",
                    "view_sae": "viewer",
                    "add_languagemodel": "researcher",
                    "add_sae": "researcher",
                    "change_languagemodel": "curator",
                    "change_sae": "curator",
                    "delete_languagemodel": "curator",
                    "delete_sae": "curator",
                },
            ),
            migrations.RunPython.noop,
        )
    ]
