from django.db import migrations

from saehub.accounts.roles import grant


class Migration(migrations.Migration):
    dependencies = [("saes", "0014_tags_and_stars")]
    operations = [
        migrations.RunPython(
            grant("saes", {"star_sae": "viewer", "tag_sae": "annotator"}),
            migrations.RunPython.noop,
        )
    ]
