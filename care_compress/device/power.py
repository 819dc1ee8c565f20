"""Electric power of a Jetson, as its INA3221 monitors tell it in files that need no root."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from care_compress.device.sensors import system_text

# The rail that feeds all others, on the boards that measure it (Orin NX and Nano).
WHOLE_BOARD = "VDD_IN"
NO_RAILS = "no INA3221 under /sys/bus/i2c tells a rail's voltage and current"
_UNUSED = ("", "NC")


@dataclass(frozen=True)
class Rail:
    """One measured supply: its files, in mV and mA."""

    name: str
    volts: Path
    amperes: Path

    def watts(self) -> float | None:
        """Power at this moment; None where the monitor gives no answer."""
        texts = [system_text(path).strip() for path in (self.volts, self.amperes)]
        if not all(re.fullmatch(r"-?\d+", text) for text in texts):
            return None
        return int(texts[0]) * int(texts[1]) / 1e6


def find_rails(root: Path) -> tuple[Rail, ...]:
    """What adds up to the board's power: its input where that is measured, else every rail.

    A monitor has three channels; in7 and curr4 of the same folder are sums of them.
    """
    rails = {}
    for label in sorted(root.glob("sys/bus/i2c/devices/*/hwmon/hwmon*/in[123]_label")):
        name, channel = system_text(label).strip(), label.name[2]
        folder = label.parent
        rail = Rail(name, folder / f"in{channel}_input", folder / f"curr{channel}_input")
        if name not in _UNUSED and rail.watts() is not None:
            rails[name] = rail
    return (rails[WHOLE_BOARD],) if WHOLE_BOARD in rails else tuple(rails.values())


def read_watts(rails: Sequence[Rail]) -> float | None:
    """The sum of all rails; None unless each of them answers."""
    found = [rail.watts() for rail in rails]
    known = [watts for watts in found if watts is not None]
    return sum(known) if found and len(known) == len(found) else None


@dataclass(frozen=True)
class Energy:
    """What a model's runs cost, from mean power while it ran and while nothing did."""

    rails: tuple[str, ...]
    idle_watts: float
    watts: float
    images_per_second: float

    def as_record(self) -> dict[str, object]:
        """As it stands in results.json, with the idle power in it and without."""
        return {
            "rails": list(self.rails),
            "idle_watts": self.idle_watts,
            "watts": self.watts,
            "millijoules_per_image": 1000 * self.watts / self.images_per_second,
            "millijoules_above_idle": 1000
            * (self.watts - self.idle_watts)
            / self.images_per_second,
            "images_per_second_per_watt": self.images_per_second / self.watts,
        }
