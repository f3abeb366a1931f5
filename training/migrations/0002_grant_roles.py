from django.db import migrations

from saehub.accounts.roles import grant


class Migration(migrations.Migration):
    dependencies = [
        ("training", "0001_corpora_captures_runs"),
        ("auth", "0012_alter_user_first_name_max_length"),
        ("contenttypes", "0002_remove_content_type_name"),
    ]

    operations = [
        migrations.RunPython(
            grant(
                "training",
                {
                    "view_corpus": "viewer",
                    "view_capture": "viewer",
                    "view_run": "viewer",
                    "view_runpoint": "viewer",
                    "view_evaluation": "viewer",
                    "add_corpus": "researcher",
                    "add_capture": "researcher",
                    "add_run": "researcher",
                    "add_evaluation": "researcher",
                    "change_corpus": "curator",
                    "change_capture": "curator",
                    "change_run": "curator",
                    "delete_corpus": "curator",
                    "delete_capture": "curator",
                    "delete_run": "curator",
                    "delete_evaluation": "curator",
                },
            ),
            migrations.RunPython.noop,
        )
    ]
