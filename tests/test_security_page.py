"""Attacks on the page of `attnctl ui`: each is refused, or leaves nothing that runs."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from attnctl.app.ui.guard import host_allowed
from attnctl.errors import AttnctlError
from attnctl.plans import HeadSet
from attnctl.plans.folders import OwnFolder, clear_left_over

pytest.importorskip("gradio", reason="gradio is not installed")


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    from attnctl.app.ui.models import Models
    from attnctl.app.ui.serve import serving

    with serving(Models()) as url:
        yield url


def asked(url: str, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Any:
    """Send one request with headers of our own, and return the answer with its body."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=30)
    try:
        connection.putrequest(method, path, skip_host=True)
        for name, value in ({"Host": where.netloc} | {n.replace("_", "-"): v for n, v in headers.items()}).items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


# Whose requests are answered (49)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.", "", "[::"]
)
def test_a_foreign_host_is_refused(page: str, host: str) -> None:
    answer, body = asked(page, "/", Host=host)
    if host == "localhost.":  # the same name, written in full
        assert answer.status == 200
        return
    assert answer.status == 403
    assert b"This page is served as localhost or as 127.0.0.1; the request asks for" in body


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/info", "/gradio_api/file=x", "/gradio_api/queue/join"])
@pytest.mark.parametrize("origin", ["http://evil.example", "https://evil.example:443", "null"])
def test_a_foreign_origin_is_refused(page: str, path: str, origin: str) -> None:
    answer, body = asked(page, path, Origin=origin)
    assert answer.status == 403
    assert b"answers its own requests" in body
    assert answer.getheader("Access-Control-Allow-Origin") is None


def test_the_page_answers_itself(page: str) -> None:
    where = urlsplit(page)
    for host in (where.netloc, f"localhost:{where.port}", f"[::1]:{where.port}"):
        assert asked(page, "/config", Host=host, Origin=page.rstrip("/"))[0].status == 200


@pytest.mark.parametrize(
    ("header", "host", "allowed"),
    [
        ("127.0.0.1:7860", "127.0.0.1", True), ("localhost", "127.0.0.1", True), ("[::1]:7860", "::1", True),
        ("192.168.0.7:7860", "127.0.0.1", False), ("192.168.0.7:7860", "192.168.0.7", True),
        ("192.168.0.7:7860", "0.0.0.0", True), ("[fe80::1]:7860", "::", True), ("box.lan", "box.lan", True),
        ("evil.example", "0.0.0.0", False), ("evil.example", "::", False), ("evil.example", "box.lan", False),
        ("1.2.3.4.evil.example", "0.0.0.0", False), ("", "127.0.0.1", False), ("user@127.0.0.1.x", "127.0.0.1", False),
    ],
)  # fmt: skip
def test_hosts(header: str, host: str, allowed: bool) -> None:
    assert host_allowed(header, host) is allowed


# How files are handed out (50)


def uploaded(page: str, name: str, content: bytes) -> str:
    """Upload a file as the page does, and return where it lies."""
    import json

    edge = "x" * 30
    head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = head + content + f"\r\n--{edge}--\r\n".encode()
    kind = f"multipart/form-data; boundary={edge}"
    answer, text = asked(page, "/gradio_api/upload", "POST", body, Content_Type=kind, Content_Length=str(len(body)))
    assert answer.status == 200, text
    return str(json.loads(text)[0])


@pytest.mark.parametrize("name", ["x.html", "x.svg", "x.xhtml", "x.xml", "x.js", "x.pdf", "x.png", "x.mp4", "x"])
def test_an_uploaded_file_is_a_download_that_runs_nothing(page: str, name: str) -> None:
    path = uploaded(page, name, b"<html><script>alert(1)</script></html>")
    for address in (f"/gradio_api/file={path}", f"/gradio_api/file%3D{path}"):
        answer, _ = asked(page, address)
        if answer.status != 200:
            assert address.startswith("/gradio_api/file%3D")
            continue
        assert (answer.getheader("Content-Disposition") or "").startswith("attachment")
        assert answer.getheader("Content-Security-Policy") == "default-src 'none'; sandbox"
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
        shown = {"x.png": "image/png", "x.mp4": "video/mp4"}
        assert answer.getheader("Content-Type") == shown.get(name, "application/octet-stream")


def test_other_files_are_not_handed_out(page: str, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    own = Path(os.environ["GRADIO_TEMP_DIR"]).parent
    for path in (tmp_path / "secret.txt", Path("/etc/passwd"), own / "lock", own / "uploads" / ".." / "lock"):
        assert asked(page, f"/gradio_api/file={path}")[0].status in (403, 404)


# What a control may name on the page (51)


@pytest.mark.parametrize(
    "line",
    ['PARO(plan="somebody/plan")', 'PARO(plan="{folder}")', 'PARO(plan="/etc")', 'BroadWay(mask="{folder}/x.png")'],
)
def test_a_control_on_the_page_names_no_files(line: str, tmp_path: Path, unplugged: None) -> None:
    from attnctl.app.ui.inputs import written

    HeadSet.from_pairs([(1, 2)]).save_pretrained(tmp_path)
    with pytest.raises(AttnctlError, match="The page reads no files and fetches nothing"):
        written(line.format(folder=tmp_path))
    assert len(written("PAG(scale=2.0)\n\nSEG")) == 2


# What a killed page leaves (57)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("prefix", ["attnctl-ui-", "attnctl-source-"])  # of pages, and of attention kept on the disk
def test_the_folder_of_a_killed_process_goes_at_the_next_start(prefix: str, tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom attnctl.plans.folders import OwnFolder\n"
        f"own = OwnFolder({prefix!r})\n(own.path / 'big.bin').write_bytes(b'x' * 1000)\n"
        "print(own.path, flush=True)\ntime.sleep(60)\n"
    )
    env = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        clear_left_over(prefix, tmp_path)
        assert (folder / "big.bin").exists()  # it runs: its folder stays
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert folder.exists()
    (tmp_path / f"{prefix}strange").mkdir()  # none that attnctl made
    (tmp_path / f"{prefix}link").symlink_to(tmp_path)
    own = OwnFolder(prefix, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p != own.path) == [f"{prefix}link", f"{prefix}strange"]
    clear_left_over(prefix, tmp_path)
    assert own.path.is_dir()
    own.close()
    assert not own.path.exists()


def test_pages_and_stores_have_such_folders(page: str, tmp_path: Path) -> None:
    from attnctl.processors.editing.source import SourceStore

    assert Path(os.environ["GRADIO_TEMP_DIR"]).parent.name.startswith("attnctl-ui-")
    store = SourceStore("qk", "disk", tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("attnctl-source-")
    store.close()
    assert not folder.exists()
