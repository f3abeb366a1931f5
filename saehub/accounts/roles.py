"""The shipped groups. Each app grants its own permissions to them in a migration, through `grant`.

viewer < annotator < researcher < curator < admin: each may do what the one before it may.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

ROLES = ("viewer", "annotator", "researcher", "curator", "admin")


def grant(app_label: str, grants: Mapping[str, str]) -> Callable[[Any, Any], None]:
    """A RunPython function that gives each permission codename to a role and all roles above it.

    `grants`: codename -> least role. Permissions are made here when missing: Django makes them only after all migrations.
    """

    def run(apps: Any, schema_editor: Any) -> None:
        groups = {role: apps.get_model("auth", "Group").objects.get_or_create(name=role)[0] for role in ROLES}
        for codename, least in grants.items():
            permission = _permission(apps, app_label, codename)
            for role in ROLES[ROLES.index(least) :]:
                groups[role].permissions.add(permission)

    return run


def _permission(apps: Any, app_label: str, codename: str) -> Any:
    action, _, model = codename.rpartition("_")
    types = apps.get_model("contenttypes", "ContentType")
    owner = next((m for m in apps.get_app_config(app_label).get_models() if codename in _codenames(m)), None)
    if owner is None:
        raise LookupError(f"{app_label} has no permission {codename}.")
    kind, _ = types.objects.get_or_create(app_label=app_label, model=owner._meta.model_name)
    return apps.get_model("auth", "Permission").objects.get_or_create(
        content_type=kind, codename=codename, defaults={"name": f"Can {action.replace('_', ' ')} {model}"}
    )[0]


def _codenames(model: Any) -> set[str]:
    own = {codename for codename, _ in model._meta.permissions}
    return own | {f"{action}_{model._meta.model_name}" for action in model._meta.default_permissions}
