"""Pages as a real browser shows them; tests are skipped where there is none."""

import html
import json
import re
import shutil
import subprocess

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)

PHONE, DESK = 390, 1400

_HARNESS = """<body>{windows}<pre id="seen"></pre><script>
const windows = [...document.getElementsByTagName("iframe")]
function seen(window) {{
  const page = window.contentDocument, root = page.documentElement
  return {{
    title: page.title,
    text: page.body.innerText,
    overflow: root.scrollWidth - root.clientWidth,
    scrolled: [...page.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth)
      .map(e => getComputedStyle(e).backgroundAttachment),
    pictures: [...page.images].map(i => [i.alt, i.naturalWidth, i.getBoundingClientRect().width]),
    scripts: page.scripts.length,
    fetched: [...page.querySelectorAll("[src], [href]")].map(e => e.src || e.href)
      .filter(u => !u.startsWith("data:")),
  }}
}}
onload = () => document.getElementById("seen").textContent = JSON.stringify(windows.map(seen))
</script></body>"""
_WINDOW = '<iframe style="width:{}px;height:900px" src="{}.html"></iframe>'


def seen(directory, pages, *widths):
    """What a browser shows of pages, by name and by the pixels of its window."""
    if BROWSER is None:
        pytest.skip("needs chromium")
    for name, page in pages.items():
        (directory / f"{name}.html").write_text(page, encoding="utf-8")
    places = [(name, width) for name in pages for width in widths]
    windows = "".join(_WINDOW.format(width, name) for name, width in places)
    harness = directory / "all of them.html"
    harness.write_text(_HARNESS.format(windows=windows))
    ran = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--allow-file-access-from-files", "--virtual-time-budget=10000"),
            f"--user-data-dir={directory / 'browser'}",
            harness.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    (found,) = re.findall(r'<pre id="seen">(.+?)</pre>', ran.stdout, re.DOTALL)
    return dict(zip(places, json.loads(html.unescape(found)), strict=True))
