"""Files for browsers: the page of `device/web`, the device bundles of an export and the demo's clips, nothing else.

The page runs without inline scripts and talks to its own origin only. It is isolated from other origins, without which
browsers refuse threads.
"""

import mimetypes
import re
from http import HTTPStatus
from pathlib import Path

from fastapi import Request
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException

from cdc_mmpg.device.page import DEMO_FILE, DEMO_FOLDER, DEVICE_FOLDERS, LIBRARIES, PAGE, VENDOR, are_installed
from cdc_mmpg.errors import CheckpointError, ConfigError

PAGE_PATTERNS = ("index.html", "icon.svg", "*.js", "page/*.js", "page/*.css")
BUNDLE_SUFFIXES = (".json", ".onnx", ".bin")
MEDIA_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; "
    "img-src 'self' blob:; media-src 'self' blob:; connect-src 'self'; worker-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # a browser asks whether its copy is current
}


class Page:
    """The page with the bundles of an export.

    Args:
        export: folder of the export.

    Raises:
        ConfigError: the page's libraries are not installed.
        CheckpointError: the export has no device bundle.
    """

    def __init__(self, export: Path) -> None:
        if not are_installed():
            raise ConfigError("the libraries of the page are not installed: run make web")
        found = (path for pattern in PAGE_PATTERNS for path in PAGE.glob(pattern))
        files = {path.relative_to(PAGE).as_posix(): path for path in found}
        files |= {f"{VENDOR.name}/{name}": VENDOR / name for name in LIBRARIES}
        for name in DEVICE_FOLDERS.values():
            bundle = export / name
            if not (bundle / "bundle.json").is_file():
                raise CheckpointError(f"{bundle}: no device bundle: run make export")
            files |= {f"{name}/{path.name}": path for suffix in BUNDLE_SUFFIXES for path in bundle.glob(f"*{suffix}")}
        demo = export / DEMO_FOLDER
        files |= {f"{demo.name}/{path.name}": path for path in (demo / DEMO_FILE, *demo.glob("*.mp4"))}
        self._files = {f"/{name}": path for name, path in files.items()} | {"/": files["index.html"]}

    async def send(self, request: Request) -> Response:
        """Reply with a file, compressed if that is stored beside it; 304 if the browser has it.

        Raises:
            HTTPException: 404: there is no such file.
        """
        path = self._files.get(request.url.path)
        if path is None or not path.is_file():
            raise HTTPException(HTTPStatus.NOT_FOUND)
        media_type = MEDIA_TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        headers = dict(HEADERS)
        compressed = path.with_name(f"{path.name}.gz")
        if compressed.is_file():
            headers["Vary"] = "Accept-Encoding"
            if re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", request.headers.get("accept-encoding", "")):
                path, headers["Content-Encoding"] = compressed, "gzip"
        response = FileResponse(path, headers=headers, media_type=media_type, stat_result=path.stat())
        if response.headers["etag"] in re.findall(r'"[^"]*"', request.headers.get("if-none-match", "")):
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers={**headers, "ETag": response.headers["etag"]})
        return response
