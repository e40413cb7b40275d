"""Files of a tokenizer, which are read in a process of their own before this one reads them.

On some damaged files, such as a prefix of subwords that is longer than a token, or a table of
characters that is cut off, the library that reads them aborts the process, panics, or fills the
memory.  A process of 40 milliseconds tells.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from osscar.base.errors import FileError, ModelError
from osscar.base.files import reason_of
from osscar.base.inputs import check_regular
from osscar.base.json_files import MEGABYTE, read_object

_TOKENIZER_FILE = "tokenizer.json"

_LARGEST = 512 * MEGABYTE
_SECONDS = 60
_MEMORY = 16 * 2**30

_READ_IT = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[3]),) * 2)
except (ImportError, ValueError):
    pass
from tokenizers import Tokenizer
try:
    tokenizer = Tokenizer.from_file(sys.argv[1])
    for text in ("text", "", "Two  words,\\n3 \\u00e9\\u4e16\\U0001f600 \\u0301\\t!", "x" * 300):
        ids = tokenizer.encode(text).ids
        tokenizer.decode(ids)
except BaseException as error:
    print(" ".join(str(error).split())[:300] or type(error).__name__)
else:
    print("read")
"""

_OTHER_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "generation_config.json",
)


def check_tokenizer(directory: Path) -> None:
    """Refuse a tokenizer that the library cannot read, or not without ending the process."""
    file = directory / _TOKENIZER_FILE
    try:
        check_regular(file)
        if not file.exists():
            return
        if file.stat().st_size > _LARGEST:
            raise FileError(file, f"it has more than {_LARGEST:,} bytes")
        # Isolated: no module beside the user's files is taken for one of the library's.
        options = (json.dumps(sys.path[1:] if sys.path[:1] == [""] else sys.path), str(_MEMORY))
        done = subprocess.run(
            [sys.executable, "-I", "-c", _READ_IT, str(file.absolute()), *options],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
        said = done.stdout.decode(errors="replace").strip()
        if said != "read":
            raise FileError(file, said or f"its reader ended with status {done.returncode}")
    except subprocess.TimeoutExpired:
        raise no_tokenizer(
            f"directory {directory}", f"reading it took more than {_SECONDS} s"
        ) from None
    except (OSError, ValueError) as error:
        raise no_tokenizer(f"directory {directory}", reason_of(error)) from error
    except FileError as error:
        raise no_tokenizer(f"directory {directory}", error.reason) from error


def check_other_files(directory: Path) -> None:
    """Refuse files beside the weights, which libraries read whole, that are no JSON objects."""
    for name in _OTHER_FILES:
        if (directory / name).exists():
            try:
                read_object(directory / name)
            except FileError as error:
                raise ModelError(f"{error}; get the checkpoint anew") from error


def no_tokenizer(source: str, reason: str) -> ModelError:
    """Return the error of a model without a tokenizer."""
    return ModelError(
        f"{source} has no tokenizer that transformers can read: {reason}. Copy the tokenizer's "
        "files of the original model into its directory"
    )
