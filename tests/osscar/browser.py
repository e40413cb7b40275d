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
_WINDOW = '<iframe style="width:{}px;height:900px" src="{}"></iframe>'


def seen(page, width):
    """What a browser shows of a page (a file) in a window of so many pixels."""
    (shown,) = seen_at(page, width)
    return shown


def seen_at(page, *widths):
    """The same in several windows of one browser, which takes longer to start than to show."""
    if BROWSER is None:
        pytest.skip("needs chromium")
    harness = page.with_name(f"{page.stem}.harness.html")
    windows = "".join(_WINDOW.format(width, page.name) for width in widths)
    harness.write_text(_HARNESS.format(windows=windows))
    ran = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--allow-file-access-from-files", "--virtual-time-budget=10000"),
            f"--user-data-dir={page.parent / 'browser'}",
            harness.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    harness.unlink()
    (found,) = re.findall(r'<pre id="seen">(.+?)</pre>', ran.stdout, re.DOTALL)
    return json.loads(html.unescape(found))
