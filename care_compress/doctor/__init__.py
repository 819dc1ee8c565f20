"""``care-compress doctor``: what this machine can export, build, run and measure.

`diagnosis` decides from a description of the machine alone, so it can be asked about any machine;
`runtimes` tries what is installed; `text` is what people read.
"""

import json
import os

from care_compress.doctor.diagnosis import diagnose, diagnosis_as_dict
from care_compress.doctor.runtimes import try_runtimes
from care_compress.doctor.text import render
from care_compress.machine import read_machine
from care_compress.target import all_targets
from care_compress.terminal import Terminal


def run_doctor(as_json: bool) -> None:
    """Examine this machine and print the answer."""
    machine = read_machine()
    diagnosis = diagnose(machine, all_targets(), try_runtimes(machine), os.environ)
    if as_json:
        print(json.dumps(diagnosis_as_dict(diagnosis), indent=2))
    else:
        render(diagnosis, Terminal(highlight=False))
