"""What `import osscar` offers, and what it costs."""

import subprocess
import sys

import pytest

import osscar


def test_public_names_are_where_the_stub_says():
    for name in osscar.__all__:
        assert callable(getattr(osscar, name))
        assert name in dir(osscar)
    with pytest.raises(AttributeError, match="nothing"):
        osscar.nothing  # noqa: B018


def test_importing_and_asking_for_help_load_no_numerics():
    script = (
        "import sys, contextlib, io, osscar.cli\n"
        "sys.argv = ['osscar', '--help']\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    osscar.cli.main()\n"
        "heavy = {'torch', 'numpy', 'scipy', 'transformers', 'matplotlib', 'networkx'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
