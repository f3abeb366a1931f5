from django.db import migrations, models

from saehub.accounts.roles import grant


class Migration(migrations.Migration):
    """What is kept of an import, and who may delete: owners their own; what belongs to nobody only who acts for others."""

    dependencies = [("saes", "0003_catalogue_and_curation")]

    operations = [
        migrations.AddField(
            model_name="sae",
            name="asked",
            field=models.JSONField(default=list, editable=False, help_text="Names of facts that its import waits for"),
        ),
        migrations.AddField(
            model_name="sae",
            name="checksums",
            field=models.JSONField(
                default=dict, editable=False, help_text="Of its files here: {name: {sha256, bytes}}"
            ),
        ),
        migrations.AlterField(
            model_name="sae",
            name="sha256",
            field=models.CharField(blank=True, db_index=True, help_text="Of its weights, as published", max_length=64),
        ),
        migrations.RunPython(grant("saes", {"delete_sae": "researcher"}), migrations.RunPython.noop),
    ]
