"""The page: static files of the package, without a build step."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from mezzotint.server.bodies import error_reply

PAGE = Path(__file__).parent / "page"


async def _index(_: object) -> Response:
    index = PAGE / "index.html"
    if not index.is_file():
        return error_reply("this installation has no page", 404, code="not_found")
    return FileResponse(index, media_type="text/html", headers={"Cache-Control": "no-cache"})


class _Files(StaticFiles):
    """Files that a browser asks for again, with their ETag, after an update."""

    def file_response(self, *args: object, **options: object) -> Response:
        """Return a file."""
        reply = super().file_response(*args, **options)  # type: ignore[arg-type]
        reply.headers["Cache-Control"] = "no-cache"
        return reply


def add_page(app: Starlette) -> None:
    """Add the routes of the page."""
    app.router.routes.append(Route("/", _index, methods=["GET"]))
    if PAGE.is_dir():
        app.router.routes.append(Mount("/static", _Files(directory=PAGE)))
