"""The table behind the labels of `builtin:stdlib`: which area of the standard library a module belongs to.

A module that stands in no row is no client: private and platform-specific ones, test suites, and those that left the
library by Python 3.13 (PEP 594), so that the data of neighbouring versions of Python is nearly the same.
"""

_ROWS: dict[str, str] = {
    "concurrency": """
        asyncio concurrent contextvars multiprocessing queue sched select selectors signal socketserver subprocess
        threading
    """,
    "development": """
        bdb cProfile cmd code doctest ensurepip faulthandler logging pdb profile pstats pydoc rlcompleter timeit trace
        traceback tracemalloc unittest venv warnings zipapp
    """,
    "files": """
        bz2 compression configparser copyreg csv dbm filecmp fileinput fnmatch glob gzip io linecache lzma mailbox
        marshal mmap netrc ntpath pathlib pickle plistlib posixpath shelve shutil sqlite3 stat tarfile tempfile tomllib
        zipfile zlib
    """,
    "language": """
        __future__ abc annotationlib ast atexit codeop compileall contextlib dataclasses dis functools gc importlib
        inspect keyword modulefinder opcode operator pickletools pkgutil py_compile pyclbr runpy site symtable sys
        tabnanny token tokenize types typing weakref zipimport
    """,
    "network": """
        email ftplib http imaplib ipaddress mimetypes nturl2path poplib smtplib socket ssl urllib uuid webbrowser
        wsgiref xmlrpc
    """,
    "numbers": """
        array bisect builtins calendar cmath collections colorsys copy datetime decimal enum fractions graphlib heapq
        itertools math numbers random secrets statistics time zoneinfo
    """,
    "system": """
        antigravity argparse ctypes curses errno fcntl getopt getpass grp optparse os platform pty pwd resource
        sysconfig termios tkinter tty turtle wave
    """,
    "text": """
        base64 binascii codecs difflib gettext hashlib hmac html json locale pprint quopri re reprlib shlex string
        stringprep struct textwrap unicodedata xml
    """,
}

AREAS: tuple[str, ...] = tuple(_ROWS)
"""The eight labels, in alphabetical order."""

AREA_OF: dict[str, str] = {module: area for area, modules in _ROWS.items() for module in modules.split()}
"""The area of every module that is a client."""

PUBLIC_NAME: dict[str, str] = {
    "_collections_abc": "collections",
    "_compression": "gzip",
    "_csv": "csv",
    "_markupbase": "html",
    "_pickle": "pickle",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "_signal": "signal",
    "_socket": "socket",
    "_sqlite3": "sqlite3",
    "_strptime": "time",
    "_struct": "struct",
    "_thread": "threading",
    "_threading_local": "threading",
    "_weakrefset": "weakref",
    "genericpath": "posixpath",
    "posix": "os",
}
"""The name under which users know a module that has a private one; it enters the names, hence the split."""

COMPILED: tuple[str, ...] = (
    "_csv",
    "_pickle",
    "_signal",
    "_socket",
    "_sqlite3",
    "_struct",
    "_thread",
    "array",
    "binascii",
    "builtins",
    "cmath",
    "fcntl",
    "gc",
    "itertools",
    "marshal",
    "math",
    "mmap",
    "posix",
    "resource",
    "select",
    "sys",
    "termios",
    "time",
    "unicodedata",
    "zlib",
)
"""Modules written in C that are imported for their docstrings: none of them does anything when imported.

Those whose Python twin is read as source (decimal, datetime, io) are left out: two wordings of one docstring would
carry words of the test split into the training split.
"""
