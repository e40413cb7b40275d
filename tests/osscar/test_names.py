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


@pytest.mark.parametrize("command", [["prune", "demo"], ["sweep", "demo"], ["backends"]])
def test_a_command_says_what_it_does_before_it_loads_torch(command):
    script = (
        "import sys, osscar.cli\n"
        "class Ends:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': sys.exit(7)\n"
        "sys.meta_path.insert(0, Ends())\n"
        f"sys.argv = ['osscar', *{command}]\n"
        "osscar.cli.main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    said = "progress: loading torch, which takes seconds\n"
    assert (ended.returncode, ended.stderr, ended.stdout) == (7, said, "")
