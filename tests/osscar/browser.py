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

_HARNESS = """<body><iframe id="page" style="width:{width}px;height:900px" src="{name}"></iframe>
<pre id="seen"></pre><script>
document.getElementById("page").onload = event => {{
  const page = event.target.contentDocument, root = page.documentElement
  document.getElementById("seen").textContent = JSON.stringify({{
    title: page.title,
    text: page.body.innerText,
    overflow: root.scrollWidth - root.clientWidth,
    scrolled: [...page.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth)
      .map(e => getComputedStyle(e).backgroundAttachment),
    pictures: [...page.images].map(i => [i.alt, i.naturalWidth, i.getBoundingClientRect().width]),
    scripts: page.scripts.length,
    fetched: [...page.querySelectorAll("[src], [href]")].map(e => e.src || e.href)
      .filter(u => !u.startsWith("data:")),
  }})
}}
</script></body>"""


def seen(page, width):
    """What a browser shows of a page (a file) in a window of so many pixels."""
    if BROWSER is None:
        pytest.skip("needs chromium")
    harness = page.with_name(f"{page.stem}-{width}.harness.html")
    harness.write_text(_HARNESS.format(width=width, name=page.name))
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
