from django.db import migrations

from saehub.accounts.roles import grant


class Migration(migrations.Migration):
    dependencies = [("saes", "0012_pinned_by_curators")]
    operations = [
        migrations.RunPython(
            grant("saes", {"view_hubrepository": "viewer", "delete_hubrepository": "curator"}),
            migrations.RunPython.noop,
        )
    ]
