"""The server: a durable queue, its own API, the APIs of AUTOMATIC1111 and OpenAI, and a page.

app = create_app(Settings(data=Path("pictures")))   # an ASGI application
serve(Settings(data=Path("pictures")))              # listen until SIGTERM or Ctrl-C
"""

from mezzotint.server.app import create_app, serve
from mezzotint.server.settings import Limits, Settings

__all__ = ["Limits", "Settings", "create_app", "serve"]
