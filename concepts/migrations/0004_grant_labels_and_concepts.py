from django.db import migrations

from saehub.accounts.roles import grant

ACTIONS = ("add", "change", "delete")
OF_RESEARCHERS = (
    "conceptdictionary",
    "concept",
    "conceptfeature",
    "dictionaryrevision",
    "conceptconfig",
    "conceptimport",
)


class Migration(migrations.Migration):
    dependencies = [
        ("concepts", "0003_labels_dictionaries_configs"),
        ("auth", "0012_alter_user_first_name_max_length"),
        ("contenttypes", "0002_remove_content_type_name"),
    ]

    operations = [
        migrations.RunPython(
            grant(
                "concepts",
                {f"view_{model}": "viewer" for model in (*OF_RESEARCHERS, "label")}
                | {f"{action}_label": "annotator" for action in ACTIONS}
                | {f"{action}_{model}": "researcher" for action in ACTIONS for model in OF_RESEARCHERS},
            ),
            migrations.RunPython.noop,
        )
    ]
