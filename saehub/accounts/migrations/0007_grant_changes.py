from django.db import migrations

from saehub.accounts.roles import grant


class Migration(migrations.Migration):
    dependencies = [("accounts", "0006_changes")]

    operations = [migrations.RunPython(grant("accounts", {"view_change": "curator"}), migrations.RunPython.noop)]
