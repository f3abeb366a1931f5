from django.db import migrations

from saehub.accounts.roles import grant


class Migration(migrations.Migration):
    dependencies = [
        ("concepts", "0001_feature_views"),
        ("auth", "0012_alter_user_first_name_max_length"),
        ("contenttypes", "0002_remove_content_type_name"),
    ]

    operations = [
        migrations.RunPython(
            grant(
                "concepts",
                {
                    "view_featureview": "viewer",
                    "add_featureview": "researcher",
                    "change_featureview": "curator",
                    "delete_featureview": "curator",
                },
            ),
            migrations.RunPython.noop,
        )
    ]
