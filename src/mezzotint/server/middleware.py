"""The guard of every route: pure ASGI middleware, which sees each byte of a body before the application does.

In this order: a request id; the Host and the Origin, against allow-lists; the token; the size of the body, counted
while it arrives. The headers of replies say that no browser may guess their type, frame them or run what is in them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mezzotint.server.bodies import error_reply
from mezzotint.server.settings import Settings, is_loopback

OPEN = ("/healthz", "/api/login")  # these are answered without a token
STATIC = ("/", "/static/")  # the page itself, which holds no data, shows the login form
LINKS = "/v1/images/files/"  # each link is a secret of its own
COOKIE = "mezzotint"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "font-src 'self'; manifest-src 'self'; worker-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": CSP,
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class _TooLargeError(Exception):
    """A body is larger than allowed."""


class Guard:
    """ASGI middleware over the whole application.

    Args:
        app: The application.
        settings: The settings of the server.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._hosts = {host.lower() for host in settings.allow_hosts}
        self._hosts |= {"localhost", "127.0.0.1", "[::1]"} if is_loopback(settings.host) else {_bracket(settings.host)}
        self._any_address = settings.host in ("0.0.0.0", "::")
        self._cors = {origin.lower() for origin in settings.cors}
        self._session = cookie_value(settings.token) if settings.token else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin", "")
        request_id = secrets.token_hex(8)

        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                fields = MutableHeaders(scope=message)
                fields["X-Request-Id"] = request_id
                for name, value in SECURITY.items():
                    fields.setdefault(name, value)
                if scope["path"].startswith(("/api", "/sdapi", "/controlnet", "/v1")):
                    fields.setdefault("Cache-Control", "no-store")
                if origin.lower() in self._cors:
                    fields["Access-Control-Allow-Origin"] = origin
                    fields.add_vary_header("Origin")
                    fields["Cross-Origin-Resource-Policy"] = "cross-origin"
            await send(message)

        refused = self._refuse(scope, headers, origin)
        if refused is not None:
            await refused(scope, receive, guarded_send)
            return
        await self._pass_on(scope, receive, guarded_send, headers)

    def _refuse(self, scope: Scope, headers: Headers, origin: str) -> Response | None:
        """Return the reply that refuses a request, or None if it is allowed."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._knows_host(hosts[0]):
            return error_reply("this Host is not served; --allow-host adds a name", 421, code="unknown_host")
        if len(headers.getlist("origin")) > 1 or (origin and not self._knows_origin(origin, hosts[0])):
            return error_reply("pages of this origin may not use the server", 403, code="foreign_origin")
        if headers.get("sec-fetch-site", "") in ("cross-site", "same-site") and not origin and not _navigates(headers):
            return error_reply("other pages may not use the server", 403, code="foreign_origin")
        if scope["method"] == "OPTIONS" and origin.lower() in self._cors:
            return Response(
                status_code=204,
                headers={
                    "Access-Control-Allow-Methods": "GET, POST, PATCH, DELETE",
                    "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID",
                    "Access-Control-Max-Age": "600",
                },
            )
        if (
            self._settings.token
            and not self._is_open(scope["path"], scope["method"])
            and not self._knows_token(headers)
        ):
            challenge = {"WWW-Authenticate": 'Basic realm="mezzotint", charset="UTF-8"'}
            if "text/html" in headers.get("accept", "") or headers.get("sec-fetch-mode"):
                challenge = {}  # the page has a form of its own
            return error_reply(
                "the token is missing or wrong; send it as Bearer, or as the password of Basic",
                401,
                type="authentication_error",
                code="invalid_api_key",
                headers=challenge,
            )
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length[:20]) > self._settings.limits.body:
            return self._too_large()
        return None

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        """Call the application, and count the bytes of the body while it reads them."""
        left = self._settings.limits.body
        started = False

        async def counted_receive() -> Message:
            nonlocal left
            message = await receive()
            if message["type"] == "http.request":
                left -= len(message.get("body", b""))
                if left < 0:
                    raise _TooLargeError
            return message

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, counted_receive, watched_send)
        except _TooLargeError:
            if not started:
                await self._too_large()(scope, receive, send)

    def _too_large(self) -> Response:
        limit = self._settings.limits.body
        return error_reply(
            f"the body is larger than {limit / 2**20:g} MiB", 413, code="too_large", headers={"Connection": "close"}
        )

    # ---- who asks ----------------------------------------------------------------------------------------------------

    def _knows_host(self, host: str) -> bool:
        name = _host_name(host)
        if self._any_address and _is_address(name):
            return True  # an address cannot be rebound to another machine
        return name in self._hosts

    def _knows_origin(self, origin: str, host: str) -> bool:
        if origin.lower() in self._cors:
            return True
        scheme, _, authority = origin.lower().partition("://")
        return scheme in ("http", "https") and authority == host.lower() and self._knows_host(authority)

    def _is_open(self, path: str, method: str) -> bool:
        if path in OPEN:
            return True
        return method in ("GET", "HEAD") and (path == "/" or path.startswith(("/static/", LINKS)))

    def _knows_token(self, headers: Headers) -> bool:
        """Return whether the token is in the request, in constant time."""
        token = self._settings.token or ""
        return any([hmac.compare_digest(each.encode(), token.encode()) for each in _tokens(headers)]) or any(
            [hmac.compare_digest(each.encode(), self._session.encode()) for each in _cookies(headers)]
        )


def cookie_value(token: str) -> str:
    """Return what the cookie of a browser that has logged in holds; the token does not follow from it."""
    return hmac.new(token.encode(), b"mezzotint session", hashlib.sha256).hexdigest()


def _tokens(headers: Headers) -> Iterable[str]:
    """Yield the token of each Authorization header: of Bearer, or the password of Basic."""
    for value in headers.getlist("authorization"):
        scheme, _, text = value.partition(" ")
        if scheme.lower() == "bearer":
            yield text.strip()
        elif scheme.lower() == "basic":
            try:
                yield base64.b64decode(text.strip(), validate=True).decode().partition(":")[2]
            except (ValueError, binascii.Error):
                continue


def _cookies(headers: Headers) -> Iterable[str]:
    for value in headers.getlist("cookie"):
        try:
            found = SimpleCookie(value).get(COOKIE)
        except CookieError:
            continue
        if found is not None:
            yield found.value


def _navigates(headers: Headers) -> bool:
    """Return whether a person follows a link to the page, which is no use of the server by another page."""
    return headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"


def _host_name(host: str) -> str:
    """Return the name in a Host header, without the port; "" if it has another form."""
    host = host.lower()
    if host.startswith("["):
        name, closing, port = host.partition("]")
        name += closing
        port = port.removeprefix(":") if port.startswith(":") else port and "x"
    else:
        name, colon, port = host.partition(":")
        if colon and not port:
            return ""
    return name if not port or (port.isascii() and port.isdigit()) else ""


def _is_address(name: str) -> bool:
    import ipaddress

    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _bracket(host: str) -> str:
    return f"[{host}]".lower() if ":" in host else host.lower()
