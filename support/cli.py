"""The command line: flags by tyro, and one clear line instead of a traceback."""

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import tqdm
import tyro

from support.files import WINDOWS
from support.help import grouped

# disable=None: shown on terminals only
progress_bar = partial(tqdm.tqdm, unit="B", unit_scale=True, delay=2, disable=None, leave=False)


class BadInput(ValueError):
    """The user gave something unusable.

    The message is one sentence: which flag or file, what is wrong, what is right.
    """


def run_command(
    main: Callable, args_type: type, argv: list[str] | None = None, defaults: Callable | None = None
) -> None:
    """Run a command: read argv (sys.argv) into the dataclass args_type and call main with it.

    defaults: given argv, returns the args_type that the flags start from. Ends with exit code 2 and
    one line on stderr for BadInput and for what the operating system refuses (disk full, no
    permission), with 130 for Ctrl-C, and without a word when whoever read the output has gone
    (| head).
    """
    prepare_streams()
    argv = sys.argv[1:] if argv is None else argv
    try:
        main(parse(args_type, argv, {"default": defaults(argv)} if defaults else {}))
        sys.stdout.flush()
    except BadInput as e:
        exit_with(f"error: {e}", 2)
    except KeyboardInterrupt:
        exit_with("interrupted", 130)
    except OSError as e:
        if reader_has_gone(e):
            # or Python complains when it flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)  # as a shell reports it
        if e.errno is None:  # not from the operating system
            raise
        exit_with(f"error: {e.filename}: {e.strerror}" if e.filename else f"error: {e.strerror}", 2)


def reader_has_gone(e: OSError) -> bool:
    """Did whoever read the output end? Windows says EINVAL of a closed pipe."""
    return isinstance(e, BrokenPipeError) or (WINDOWS and e.errno == errno.EINVAL)


def prepare_streams() -> None:
    """Give stdout and stderr somewhere to go, where they were closed, and UTF-8."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # Windows' own encoding cannot print every text
            stream.reconfigure(encoding="utf-8", errors="replace")


def parse(args_type: type, argv: list[str], default: dict) -> Any:
    """tyro.cli, with its complaint, a box of several lines, made one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            with grouped_help(args_type, argv):
                return tyro.cli(args_type, args=argv, use_underscores=True, **default)
    except SystemExit as e:
        if not e.code:  # --help
            raise
        without_title = complaint.getvalue().partition("\n")[2]
        words = re.sub("[─-╿]+|-{3,}", " ", without_title).split()  # the frame goes
        reason = re.split(" Argument helptext| For full helptext", " ".join(words))[0]
        raise BadInput(reason or "these flags cannot be read; --help lists them") from None
    except ValueError as e:  # a dataclass that refuses its values, as mfa.Config does
        models = [vars(at.model) for at in default.values() if hasattr(at, "model")]
        is_flag = any(str(e).partition(' ')[0] in fields for fields in models)
        raise BadInput(f"{'--' * is_flag}{e}") from None


def typed(text: str) -> str:
    """A flag's text as it was typed in UTF-8, where Python was told that it is another encoding."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:  # it is another
        return text


def exit_with(line: str, code: int) -> NoReturn:
    print(line.replace("\n", " "), file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def grouped_help(args_type: type, argv: list[str]) -> Iterator[None]:
    """Sorts what --help prints into groups, for flags as many as a model's."""
    many = "model" in args_type.__dataclass_fields__
    if not many or not {"-h", "--help"} & set(argv):
        yield
        return
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        print(grouped(printed.getvalue()))
