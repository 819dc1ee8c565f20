"""A pip requirement, read without pip, which a device may not have."""

import re


def version_numbers(text: str) -> tuple[int, ...]:
    """(10, 3, 0, 30) of ``10.3.0.30`` and of ``10.3.0.30.post1``."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def satisfies(version: tuple[int, ...], requirement: str) -> bool:
    """Whether a version meets ``tensorrt>=10.3,<12``; pip's own parser is not on a board."""
    for operator, wanted in re.findall(r"(>=|<=|==|!=|>|<)\s*([\d.]+)", requirement):
        limit = version_numbers(wanted)
        # 10.3.0.30 counts as 10.3 here, as it does for pip with ==10.3.*.
        short = version[: len(limit)]
        met = {
            ">=": short >= limit,
            "<=": short <= limit,
            "==": short == limit,
            "!=": short != limit,
            ">": short > limit,
            "<": short < limit,
        }
        if not met[operator]:
            return False
    return True


def required_module(requirement: str) -> str:
    """The module that ``tensorrt>=10.3`` or ``tensorrt-rtx>=1.7`` names."""
    return re.split(r"[<>=!~\s\[]", requirement.strip(), maxsplit=1)[0].replace("-", "_")
