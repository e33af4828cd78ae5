"""Your own attention: a Python file that adds classes to mfa.ATTENTION."""

import runpy
from pathlib import Path

from mfa import ATTENTION
from support.cli import BadInput


def load_plugin(path: Path) -> None:
    """Runs the file, which is trusted as any program is. BadInput says what is wrong with it."""
    if not path.is_file():
        raise BadInput(f"--plugin {path}: there is no such file; give one that fills ATTENTION")
    before = dict(ATTENTION)
    try:
        runpy.run_path(str(path), run_name=path.stem)
    except Exception as e:
        raise BadInput(f"--plugin {path}: {type(e).__name__}: {e}") from e
    if ATTENTION == before:
        raise BadInput(f'--plugin {path}: adds nothing; end it with ATTENTION["name"] = YourClass')


def load_plugin_of(ckpt: dict, path: Path) -> None:
    """The plug-in of a checkpoint, if it has one: its text is kept in the run's folder."""
    name = ckpt["args"].get("plugin")
    if name:
        load_plugin(path.parent / Path(name).name)
