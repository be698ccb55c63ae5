"""Exceptions from the scheme, by patterns on the parameters' names."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hvd_quant.schemes import SCHEMES, Scheme

_SCHEMES = {scheme.name: scheme for scheme in SCHEMES}


class Overrides:
    """Schemes of single parameters, or None for those that stay uncompressed.

    Args:
        given: a mapping of case-sensitive shell patterns (``*``, ``?``, ``[...]``) to schemes or None. The
            first pattern that matches a name holds. Or the path of a YAML or TOML file (by its suffix, .yaml,
            .yml or .toml) with such a mapping, in which ``none`` stands for None (in YAML ``null`` too) and a
            scheme is a mapping of ``scheme`` (its ``name``, such as qsgd) and its arguments:

                "*.bias": none
                "embed.*": {scheme: qsgd, bits: 8}

        rounding: rounding of schemes in a file that have none.

    Raises:
        TypeError, ValueError: patterns or schemes are invalid, or the file cannot be parsed.
        OSError: the file cannot be opened.
    """

    def __init__(
        self,
        given: Mapping[str, Scheme | None] | str | os.PathLike | None = None,
        rounding: str = "independent",
    ) -> None:
        if isinstance(given, (str, os.PathLike)):
            path = Path(given)
            read = _read(path)
            if not isinstance(read, dict):
                raise ValueError(f"{path} must hold a mapping of patterns to schemes")
            given = {pattern: _scheme(path, pattern, value, rounding) for pattern, value in read.items()}
        if not isinstance(given, Mapping | None):
            raise TypeError(
                f"overrides must be a mapping of patterns to schemes, or a file's path, not {given!r}"
            )
        self._schemes = dict(given or {})
        for pattern, scheme in self._schemes.items():
            if not isinstance(pattern, str):
                raise TypeError(f"a pattern in overrides must be a string, not {pattern!r}")
            if scheme is not None and not isinstance(scheme, Scheme):
                raise TypeError(
                    f"overrides[{pattern!r}] must be None or a scheme such as hvd_quant.QSGD(bits=8), "
                    f"not {scheme!r}"
                )

    def __bool__(self) -> bool:
        return bool(self._schemes)

    def __iter__(self) -> Iterator[tuple[str, Scheme | None]]:
        return iter(self._schemes.items())

    def pattern(self, name: str) -> str | None:
        """Return the first pattern that matches a parameter's name, or None."""
        return next((pattern for pattern in self._schemes if fnmatchcase(name, pattern)), None)

    def scheme(self, name: str, default: Any) -> Any:
        """Return a parameter's scheme, None if it stays uncompressed; ``default`` if no pattern matches."""
        pattern = self.pattern(name)
        return default if pattern is None else self._schemes[pattern]

    def unused(self, names: Iterable[str]) -> list[str]:
        """Return the patterns that hold for none of these parameters."""
        used = {self.pattern(name) for name in names}
        return [pattern for pattern in self._schemes if pattern not in used]

    def warn_of_unused(self, names: Iterable[str], kind: str, stacklevel: int) -> None:
        """Warn of the patterns that hold for none of these names of a ``kind``, such as parameters."""
        for pattern in self.unused(names):
            warnings.warn(
                f"the override of {pattern!r} holds for no {kind}: no name matches it, or all that do "
                "match an earlier pattern",
                stacklevel=stacklevel + 1,
            )


def _read(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml"):
        raise ValueError(f"overrides must be in a .yaml, .yml or .toml file, not {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: {error}") from error
    if suffix == ".toml":
        try:
            import tomllib
        except ImportError as error:
            raise ValueError(f"{path}: Python reads TOML from version 3.11 on; use YAML") from error
        try:
            return tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is no TOML: {error}") from error

    import yaml

    try:
        node = yaml.compose(text, yaml.SafeLoader)
        # For equal keys YAML would keep the last one, but the first pattern is to hold.
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if repeated := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
                raise ValueError(
                    f"{path} says more than once what holds for {', '.join(map(repr, repeated))}"
                )
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error


def _scheme(path: Path, pattern: Any, value: Any, rounding: str) -> Scheme | None:
    if value is None or value == "none":
        return None
    if not isinstance(value, dict) or str(value.get("scheme")) not in _SCHEMES:
        raise ValueError(
            f"{path}: {pattern!r} must be none, or a scheme such as {{scheme: qsgd, bits: 8}}, not {value!r}"
        )
    arguments = {"rounding": rounding, **value}
    kind = _SCHEMES[arguments.pop("scheme")]
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {pattern!r}: {error}") from error
