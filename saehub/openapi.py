"""The API object: its description says what each operation may refuse, which headers it takes, and shows an example of each."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest, HttpResponse
from ninja import NinjaAPI
from ninja.openapi.schema import OpenAPISchema

from saehub.accounts.api_access import PROBLEM
from saehub.accounts.idempotency import HEADER, LONGEST, REPLAYED
from saehub.jobs.starting import LONGEST_WAIT

PROBLEM_SCHEMA = {
    "title": "Problem",
    "description": "RFC 9457. `errors` names fields, where a field is at fault.",
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "errors": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string"}}},
    },
}
REFUSALS = {
    400: "The request cannot be read.",
    401: "Give a valid token: Authorization: Bearer sae_…",
    403: "This token may not do that; it needs training.add_run.",
    404: "There is nothing of this number.",
    405: "This address does not take that method.",
    409: "It is in use, or not in a state for this.",
    410: "The files of this text are gone or damaged; run it again.",
    413: "This is larger than a request may be.",
    415: "This takes application/json; the request says it is text/plain.",
    422: "k: Input should be greater than 0.",
    429: "200 of your jobs wait already; ask again when some of them are over.",
    502: "The Hub cannot be reached.",
    503: "The Hub is still being asked. Ask again in a moment.",
}
KEY = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "description": "Sent again with the same key, a request is done once and answered alike, for a day",
    "schema": {"type": "string", "minLength": 1, "maxLength": LONGEST, "pattern": "^[!-~]+$"},
    "example": "0f8fad5b-d9cb-469f-a165-70867728950e",
}
WAIT = {
    "name": "wait",
    "in": "query",
    "required": False,
    "description": "Seconds to wait for its jobs: 200 when they are over by then, else 202",
    "schema": {"type": "number", "minimum": 0, "maximum": LONGEST_WAIT, "default": 0},
}


class HubAPI(NinjaAPI):
    """Ninja's API, with the parts of its description that are the same everywhere put in at one place."""

    def create_response(self, request: HttpRequest, data: Any, **more: Any) -> HttpResponse:
        response = super().create_response(request, data, **more)
        if getattr(request, "replayed", False):
            response[REPLAYED] = "true"
        return response

    def get_openapi_schema(self, **given: Any) -> OpenAPISchema:
        schema = super().get_openapi_schema(**given)
        schemas: dict[str, Any] = schema["components"]["schemas"]
        schemas["Problem"] = PROBLEM_SCHEMA
        views = {self.get_openapi_operation_id(op): op.view_func for op in self._operations()}
        for place, methods in schema["paths"].items():
            for method, found in methods.items():
                _complete(found, views[found["operationId"]], place, method, schemas)
        return schema

    def _operations(self) -> list[Any]:
        return [
            operation
            for router in self._get_bound_routers()
            for view in router.path_operations.values()
            for operation in view.operations
        ]


def _complete(found: dict[str, Any], view: Any, place: str, method: str, schemas: dict[str, Any]) -> None:
    found["parameters"] += [KEY] if getattr(view, "keyed", False) else []
    found["parameters"] += [WAIT] if getattr(view, "waits", False) else []
    for sent in found.get("requestBody", {}).get("content", {}).values():
        _show(sent, schemas)
    for answer in found["responses"].values():
        for kind, sent in answer.get("content", {}).items():
            if kind == "application/json":
                _show(sent, schemas)
    refusals = {400, 401, 403, 422} | ({404} if "{" in place else set()) | ({404, 409} if method != "get" else set())
    refusals |= {404} if any(one["name"].endswith("_id") for one in found["parameters"]) else set()
    refusals |= {409} if "/features" in place else set()
    refusals |= {409, 410} if "/infer/" in place or "/export" in place else set()
    refusals |= {429} if getattr(view, "waits", False) else set()
    refusals |= {413, 415} if "requestBody" in found else set()
    refusals |= {502, 503} if "hub" in (found.get("tags") or ()) or "/saes" in place else set()
    for status in sorted(refusals):
        example = {"type": "about:blank", "title": "", "status": status, "detail": REFUSALS[status]}
        content = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}, "example": example}}
        found["responses"].setdefault(status, {"description": REFUSALS[status], "content": content})


def _show(sent: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Put the example of a schema beside it, where it has one."""
    example = example_of(sent.get("schema", {}), schemas)
    if example is not None:
        sent["example"] = example


def example_of(schema: dict[str, Any], schemas: dict[str, Any]) -> Any:
    """The first example of a schema; of an object without one what its fields have, `None` where nothing is said."""
    if "$ref" in schema:
        return example_of(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    if schema.get("examples"):
        return schema["examples"][0]
    for key in ("default", "const"):
        if key in schema:
            return schema[key]
    for one in schema.get("anyOf", ()):
        found = example_of(one, schemas)
        if found is not None:
            return found
    if schema.get("type") == "array":
        found = example_of(schema.get("items", {}), schemas)
        return [] if found is None else [found]
    if schema.get("type") == "object" and "properties" in schema:
        fields = {name: example_of(one, schemas) for name, one in schema["properties"].items()}
        return {name: value for name, value in fields.items() if value is not None} or None
    return None
