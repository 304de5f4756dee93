"""The resource and the methods for each path."""

from __future__ import annotations

import falcon
import falcon.testing
import pytest

from guestapi.api.errors import MethodNotAllowed
from guestapi.api.routing import Route, Router
from guestapi.dialects import DIALECTS


class Reading:
    """A resource with GET."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Do nothing."""


class ReadingAndPatching(Reading):
    """A resource with GET and PATCH."""

    def on_patch(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Do nothing."""


class Patching:
    """A resource with only PATCH."""

    def on_patch(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Do nothing."""


ROOT, API, KEYS, KEY, CHANGE = Reading(), ReadingAndPatching(), Reading(), Reading(), Patching()


@pytest.fixture
def router() -> Router:
    """A router with all shapes of routes."""
    made = Router(DIALECTS["incus"])
    made.add_route("/", ROOT)
    made.add_route("/1.0", API)
    made.add_route("/1.0/config", KEYS)
    made.add_route("/1.0/config/{key}", KEY)
    made.add_route("/change", CHANGE)
    return made


def found(router: Router, path: str) -> Route:
    """Return the route of a path, which must exist."""
    result = router.find(path)
    assert result is not None
    return result


@pytest.mark.parametrize(
    ("path", "resource", "template"),
    [
        ("/", ROOT, "/"),
        ("/1.0", API, "/1.0"),
        ("/1.0/config", KEYS, "/1.0/config"),
        ("/1%2e0/%63onfig", KEYS, "/1.0/config"),
    ],
)
def test_fixed_paths(router: Router, path: str, resource: object, template: str) -> None:
    """A fixed path leads to its resource, also with percent-encoded characters."""
    assert found(router, path)[0] is resource
    assert found(router, path)[2:] == ({}, template)


@pytest.mark.parametrize(
    ("segment", "key"),
    [
        ("user.foo", "user.foo"),
        ("user.a%2Fb", "user.a/b"),
        ("%2Fuser", "/user"),
        ("user.%25", "user.%"),
        ("a;b#c", "a;b#c"),
        ("%2e%2e", ".."),
        ("user.j%c3%bc", "user.jü"),
    ],
)
def test_key_is_one_segment(router: Router, segment: str, key: str) -> None:
    """A key is decoded after the path is split, so it can contain a slash, a dot, or a percent sign."""
    resource, _methods, params, template = found(router, f"/1.0/config/{segment}")
    assert resource is KEY
    assert params == {"key": key}
    assert template == "/1.0/config/{key}"


@pytest.mark.parametrize(
    "path",
    [
        "/1",
        "/1.0/",
        "/1.0/config/",
        "/1.0/config/%2F",
        "/1.0/config/a/",
        "/1.0/config/a/b",
        "/1.0%2Fconfig",
        "/1.0/config%2Fa",
        "%2F",
        "/1.0/Config",
        "/{key}",
        "",
    ],
)
def test_no_such_path(router: Router, path: str) -> None:
    """A path with a trailing slash, an encoded separator, another case or more segments has no resource."""
    assert router.find(path) is None


def test_raw_path_is_routed(router: Router) -> None:
    """The raw path is routed, not the decoded one from Falcon."""
    req = falcon.testing.create_req(path="/1.0/config/user.a/b")
    req.env["RAW_PATH"] = "/1.0/config/user.a%2Fb"
    result = router.find("/1.0/config/user.a/b", req)
    assert result is not None
    assert result[2] == {"key": "user.a/b"}


@pytest.mark.parametrize(
    ("path", "offered"), [("/", ["GET", "HEAD"]), ("/1.0", ["GET", "HEAD", "PATCH"]), ("/change", ["PATCH"])]
)
def test_methods_offered(router: Router, path: str, offered: list[str]) -> None:
    """A route offers the methods of its resource, and HEAD with GET."""
    assert sorted(found(router, path)[1]) == offered


@pytest.mark.parametrize(
    "method", ["PUT", "POST", "DELETE", "OPTIONS", "TRACE", "CONNECT", "FOO", "get", "Head", "PATCH"]
)
def test_other_methods_are_refused_by_name(router: Router, method: str) -> None:
    """Any other method is refused with 405, its name, and Allow."""
    req = falcon.testing.create_req()
    with pytest.raises(MethodNotAllowed) as refused:
        found(router, "/")[1][method](req, falcon.Response())
    assert refused.value.status_code == 405
    assert refused.value.title == f'method "{method}" not allowed'
    assert refused.value.headers is not None
    assert dict(refused.value.headers)["Allow"] == "GET, HEAD"


def test_refused_method_is_not_allowed_later(router: Router) -> None:
    """A refused method does not become an allowed one."""
    methods = found(router, "/")[1]
    assert callable(methods["PUT"])
    assert "PUT" not in methods
    assert "PUT" not in methods.allowed
