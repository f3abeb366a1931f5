"""The log of changes in /api/v1: who changed what, by page, API and administration."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.http import HttpRequest
from ninja import Field, Query, Router, Schema
from pydantic import AwareDatetime, ConfigDict

from saehub.accounts.api_access import Needs
from saehub.accounts.api_pages import LIMIT, OFFSET, Page, page
from saehub.accounts.models import Change

router = Router(tags=["Changes"])
EXAMPLE: Any = {
    "id": 812, "at": "2026-11-22T08:00:00Z", "user": "ada", "way": "api", "token": "notebook", "method": "DELETE",
    "what": "api:sae_detail",
    "path": "/api/v1/saes/12",
}  # fmt: skip


class ChangeOut(Schema):
    """A request that changed something. What was sent with it is not kept."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    id: int
    at: datetime
    user: str
    way: str = Field(description="page, api or admin")
    token: str = Field(description="Name of the API token")
    method: str
    what: str = Field(description="Name of the address, as in the code")
    path: str


@router.get("/changes", auth=Needs("accounts.view_change"), response=Page[ChangeOut], summary="Who changed what")
def change_list(
    request: HttpRequest,
    user: str = Query("", description="Only those of this user name"),
    path: str = Query("", description="Only on addresses that hold this, such as /saes/12"),
    since: AwareDatetime | None = Query(None, description="Only from then on"),
    limit: int = LIMIT,
    offset: int = OFFSET,
) -> Any:
    """The newest first. Curators and admins may look."""
    wanted = {"name": user, "path__contains": path, "at__gte": since}
    rows = Change.objects.filter(**{key: value for key, value in wanted.items() if value})
    return page(rows, limit, offset, _out)


def _out(row: Change) -> dict[str, Any]:
    return {name: getattr(row, name) for name in ("id", "at", "way", "token", "method", "what", "path")} | {
        "user": row.name
    }
