"""The OpenAPI document: FastAPI's, with the bodies that are read strictly and the form of errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from mezzotint.server.bodies import REFERENCE, bodies

ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "type": {"type": "string"},
                "message": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
            "required": ["type", "message", "param", "code"],
        }
    },
    "required": ["error"],
}
A1111_ERROR = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("error", "detail", "body", "errors")},
    "required": ["error", "detail", "body", "errors"],
}
METHODS = ("get", "post", "put", "patch", "delete")


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document of an application; it is made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes, description=__doc__)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        schemas["Error"], schemas["A1111Error"] = ERROR, A1111_ERROR
        for name, model in bodies.items():
            schema = model.model_json_schema(ref_template=REFERENCE)
            schemas.update(schema.pop("$defs", {}))
            schemas[name] = schema
        error = {"$ref": REFERENCE.format(model="Error")}
        either = {"anyOf": [{"$ref": REFERENCE.format(model="A1111Error")}, error]}
        for name in app.state.absent:
            document["paths"].pop(name, None)
        for name, path in document["paths"].items():
            content = {
                "application/json": {"schema": either if name.startswith(("/sdapi/", "/controlnet/")) else error}
            }
            for method in METHODS:
                if method in path:
                    path[method]["responses"].pop("422", None)
                    path[method]["responses"]["default"] = {"description": "What is wrong.", "content": content}
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "basic": {"type": "http", "scheme": "basic"},
        }
        document["info"]["description"] = "Draws pictures. Errors have one form, Error."
        app.openapi_schema = document
    return app.openapi_schema
