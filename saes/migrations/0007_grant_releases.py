from django.db import migrations

from saehub.accounts.roles import grant


class Migration(migrations.Migration):
    dependencies = [("saes", "0006_facets_and_words")]
    operations = [
        migrations.RunPython(
            grant(
                "saes",
                {
                    "view_release": "viewer",
                    "change_release": "curator",
                    "delete_release": "curator",
                    "add_release": "curator",
                },
            ),
            migrations.RunPython.noop,
        )
    ]
